"""Flow matching's Euler sampler (Lipman et al. 2023; Esser et al. 2024) over the fused step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.diffusion.schedulers.base import Generators, Request, SigmaStep
from kdfast.diffusion.schedulers.common import (
    check_same_channels,
    columns,
    diffusers,
    table_cache,
    table_dtype,
)
from kdfast.profiling import annotate


class FlowMatchEulerDiscreteScheduler(SigmaStep, diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc, name-defined]
    """A drop-in for ``diffusers.FlowMatchEulerDiscreteScheduler``: same config, same results, one kernel.

    The model predicts the velocity ε − x₀ (Lipman et al. 2023): y = x + (σ' − σ)·o, or with
    ``stochastic_sampling`` y = (1 − σ')·(x − σ·o) + σ'·z.
    """

    OUTPUT = diffusers.schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput

    @annotate("FlowMatchEulerDiscreteScheduler.step")
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step; arguments and result as in ``diffusers.FlowMatchEulerDiscreteScheduler.step``.

        Args:
            model_output: The model's prediction, of the sample's shape.
            timestep: One of ``timesteps``; it is read on the first step only.
            sample: x, any strides, which the result keeps.
            s_churn: Ignored, as in diffusers; so are ``s_tmin``, ``s_tmax`` and ``s_noise``.
            s_tmin: Ignored.
            s_tmax: Ignored.
            s_noise: Ignored.
            generator: Draws the noise of ``stochastic_sampling``.
            per_token_timesteps: A timestep for each token: left to diffusers' own step.
            return_dict: False: a tuple (prev_sample,).

        Raises:
            ValueError: An integer timestep, or shapes that do not fit.
        """
        if per_token_timesteps is not None:
            return super().step(
                model_output,
                timestep,
                sample,
                generator=generator,
                per_token_timesteps=per_token_timesteps,
                return_dict=return_dict,
            )
        check_same_channels(sample, model_output)
        return self._fused(
            Request(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        )

    def _fused(self, request: Request) -> Any:
        row = self._row(request.timestep)
        stochastic = bool(self.config.stochastic_sampling)
        request = request.draw(torch.float32, like=request.sample) if stochastic else request.silent()
        device, dtype = request.sample.device, table_dtype(*request.tensors())
        table = table_cache(self).get(
            stochastic, device, dtype, (self.sigmas,), lambda: flow_table(self.sigmas, stochastic)
        )
        result = self._run(request, table, row, dtype=request.model_output.dtype)
        self._step_index += 1
        return self._answer(request, result.y)


def flow_table(sigmas: Tensor, stochastic: bool) -> Tensor:
    """Coefficients of flow matching's Euler step from each σ; m is x₀ = x − σ·o."""
    sigmas = sigmas.detach().cpu().float()
    sigma, following = sigmas[:-1].double(), sigmas[1:].double()
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    if stochastic:
        return columns(len(sigma), px=one, po=-sigma, b=(1 - sigmas[1:]).double(), c=following, s=one)
    dt = (sigmas[1:] - sigmas[:-1]).double()
    return columns(len(sigma), px=one, po=-sigma, a=one, b=zero, d=dt, s=one)
