"""Euler samplers in σ (Karras et al. 2022, Alg. 2), plain and ancestral, over the fused step.

With σ → σ' and dt = σ' − σ: y = x + dt·(x − x₀)/σ. Diffusers computes in float32 and returns the model
output's dtype; so do these, but for float64 inputs, which stay float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.diffusion.schedulers.base import DrawnStep, Generators, Request, ScaledInput, SigmaStep
from kdfast.diffusion.schedulers.common import (
    check_same_channels,
    columns,
    diffusers,
    table_cache,
    table_dtype,
)
from kdfast.ops import denoise as ops
from kdfast.profiling import annotate


def sigma_x0(sigma: Tensor, prediction_type: str, scheduler: str) -> tuple[Tensor, Tensor]:
    """px and po in float64: x₀ = x − σ·ε, or (x − σ√(σ² + 1)·v)/(σ² + 1).

    Raises:
        ValueError: An unknown prediction type.
    """
    if prediction_type == "epsilon":
        return torch.ones_like(sigma), -sigma
    if prediction_type in ("sample", "original_sample"):
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    if prediction_type == "v_prediction":
        return 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5
    raise ValueError(
        f"prediction_type: {scheduler} takes epsilon, sample or v_prediction, got {prediction_type!r}"
    )


def euler_table(sigmas: Tensor, target: Tensor, gamma: float, prediction_type: str, scheduler: str) -> Tensor:
    """Coefficients of one Euler step from each σ towards ``target``.

    Args:
        sigmas: σ ``[N + 1]``.
        target: Where the deterministic part goes ``[N]``: σ', or the ancestral σ_down.
        gamma: Churn: the step starts from σ̂ = σ·(1 + γ).
        prediction_type: What the model predicts.
        scheduler: For the message of an error.

    Returns:
        float64 ``[N, 10]``; s scales the next model input.
    """
    sigma, following = sigmas[:-1].double(), sigmas[1:].double()
    hat = sigma if gamma == 0 else (sigmas[:-1] * (gamma + 1)).double()
    dt = target.double() - hat
    px, po = sigma_x0(hat if prediction_type == "epsilon" else sigma, prediction_type, scheduler)
    if prediction_type == "epsilon":
        a, b, d = torch.ones_like(dt), torch.zeros_like(dt), dt
    elif prediction_type == "v_prediction":
        # (x − x₀)/σ̂ without cancelling x: the share of x in it is σ²/(σ² + 1).
        a = 1 + dt / hat * sigma**2 / (sigma**2 + 1)
        b, d = torch.zeros_like(dt), dt / hat * sigma / (sigma**2 + 1) ** 0.5
    else:
        a, b, d = 1 + dt / hat, -dt / hat, torch.zeros_like(dt)
    return columns(len(dt), px=px, po=po, a=a, b=b, d=d, s=1 / (following**2 + 1) ** 0.5)


class EulerDiscreteScheduler(ScaledInput, SigmaStep, diffusers.EulerDiscreteScheduler):  # type: ignore[misc, name-defined]
    """A drop-in for ``diffusers.EulerDiscreteScheduler``: same config, same results, one kernel a step.

    Attributes:
        keep_pred_original: Set to False to leave ``pred_original_sample`` None.
    """

    OUTPUT = diffusers.schedulers.scheduling_euler_discrete.EulerDiscreteSchedulerOutput
    keep_pred_original: bool = True

    @annotate("EulerDiscreteScheduler.step")
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
        return_dict: bool = True,
    ) -> Any:
        """One step; arguments and result as in ``diffusers.EulerDiscreteScheduler.step``.

        Args:
            model_output: The model's prediction, of the sample's shape.
            timestep: One of ``timesteps``; it is read on the first step only.
            sample: x, any strides, which the result keeps.
            s_churn: Noise added before the step (Karras et al. 2022, Alg. 2), over all steps.
            s_tmin: Smallest σ with churn.
            s_tmax: Largest σ with churn.
            s_noise: Scale of that noise.
            generator: Draws it.
            return_dict: False: a tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: An integer timestep, or shapes that do not fit.
        """
        check_same_channels(sample, model_output)
        row = self._row(timestep)
        gamma = 0.0
        if s_churn > 0 and s_tmin <= float(self.sigmas[row]) <= s_tmax:
            gamma = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1)
            sigma = self.sigmas[row]
            spread = ((sigma * (gamma + 1)) ** 2 - sigma**2) ** 0.5
            noise = diffusers.utils.torch_utils.randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
            # Before the model's own time σ̂; rare enough to stay a pass of its own.
            wide = torch.promote_types(sample.dtype, torch.float32)
            sample = sample.to(wide) + noise * s_noise * spread.to(sample.device, non_blocking=sample.is_cuda)
        return self._euler(Request(model_output, timestep, sample, return_dict=return_dict), row, gamma)

    def _fused(self, request: Request) -> Any:
        # Without churn the step is deterministic, and no source of noise is touched.
        return self._euler(request.silent(), self._row(request.timestep), 0.0)

    def _euler(self, request: Request, row: int, gamma: float) -> Any:
        self._warn_unscaled()
        prediction, output = self.config.prediction_type, request.model_output
        dtype = table_dtype(*request.tensors())

        def build() -> Tensor:
            sigmas = self.sigmas.detach().cpu().float()
            return euler_table(sigmas, sigmas[1:], gamma, prediction, "EulerDiscreteScheduler")

        result = self._run(
            request,
            table_cache(self).get((prediction, gamma), request.sample.device, dtype, (self.sigmas,), build),
            row,
            want_x0=self.keep_pred_original,
            dtype=output.dtype,
            # A model that predicts x₀ has its own output returned.
            x0_dtype=output.dtype if "sample" in prediction else dtype,
        )
        self._step_index += 1
        return self._answer(request, result.y, result.x0)


class EulerAncestralDiscreteScheduler(
    ScaledInput,
    SigmaStep,
    DrawnStep,
    diffusers.EulerAncestralDiscreteScheduler,  # type: ignore[misc, name-defined]
):
    """A drop-in for ``diffusers.EulerAncestralDiscreteScheduler``: same config, same results, one kernel.

    Attributes:
        keep_pred_original: Set to False to leave ``pred_original_sample`` None.
    """

    OUTPUT = diffusers.schedulers.scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput
    keep_pred_original: bool = True

    def _fused(self, request: Request) -> Any:
        prediction = self.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                "prediction_type: EulerAncestralDiscreteScheduler takes epsilon or v_prediction, "
                f"got {prediction!r}"
            )
        row = self._row(request.timestep)
        self._warn_unscaled()
        request = request.draw()
        device, dtype = request.sample.device, table_dtype(*request.tensors())
        table = table_cache(self).get(
            prediction, device, dtype, (self.sigmas,), lambda: ancestral_table(self.sigmas, prediction)
        )
        result = self._run(
            request,
            table,
            row,
            want_x0=self.keep_pred_original,
            dtype=request.model_output.dtype,
            x0_dtype=dtype,
        )
        self._step_index += 1
        return self._answer(request, result.y, result.x0)


def ancestral_table(sigmas: Tensor, prediction_type: str) -> Tensor:
    """Euler to σ_down, then noise of σ_up: σ_up² = σ'²(σ² − σ'²)/σ², σ_down² = σ'² − σ_up²; float32 roots."""
    sigmas = sigmas.detach().cpu().float()
    sigma, following = sigmas[:-1], sigmas[1:]
    up = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
    down = (following**2 - up**2).clamp(min=0) ** 0.5
    table = euler_table(sigmas, down, 0.0, prediction_type, "EulerAncestralDiscreteScheduler")
    table[:, ops.COLUMNS.index("c")] = up.double()
    return table
