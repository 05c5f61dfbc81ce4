"""Multistep sampling of latent consistency models (Luo et al. 2023, arXiv:2310.04378) over the fused step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.diffusion.schedulers.base import DrawnStep, Request, VariancePreserving
from kdfast.diffusion.schedulers.common import (
    clip_bound,
    columns,
    diffusers,
    needs_quantiles,
    table_cache,
    table_dtype,
)
from kdfast.diffusion.schedulers.ddpm import blind_rows, x0_columns

_SIGMA_DATA = 0.5


class LCMScheduler(DrawnStep, VariancePreserving, diffusers.LCMScheduler):  # type: ignore[misc, name-defined]
    """A drop-in for ``diffusers.LCMScheduler``: same config, same results, one kernel a step.

    The kernel predicts the denoised sample c_out·x₀ + c_skip·x directly; only a clip between the two costs
    another pass.
    """

    SPACED = False
    OUTPUT = diffusers.schedulers.scheduling_lcm.LCMSchedulerOutput

    def _fused(self, request: Request) -> Any:
        self._check_timesteps()
        if needs_quantiles(self.config):
            return self._plain_step(request, request.generator, takes_noise=False)
        clip, sample = clip_bound(self.config), request.sample
        row = self._row(request.timestep)
        if row != self.num_inference_steps - 1:
            request = request.draw(torch.promote_types(sample.dtype, request.model_output.dtype))
        else:
            request = request.silent()
        table = self._table(clip is not None, sample.device, table_dtype(*request.tensors()))
        result = self._run(request, table, row, clip=clip, want_x0=True)
        denoised = result.x0
        if clip is not None and denoised is not None:
            c_skip, c_out = self._boundary(row)
            denoised = denoised * c_out + sample * c_skip
        self._step_index += 1
        return self._answer(request, result.y, denoised)

    def _boundary(self, row: int) -> tuple[float, float]:
        """c_skip and c_out of a step."""
        skip, out = table_cache(self).get(
            ("boundary", self.config.timestep_scaling),
            torch.device("cpu"),
            torch.float64,
            (self.timesteps,),
            lambda: torch.stack(boundary(self.timesteps, self.config.timestep_scaling)),
        )[:, row]
        return float(skip), float(out)

    def _table(self, clipped: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
        prediction, scaling = self.config.prediction_type, self.config.timestep_scaling
        sources = (self.alphas_cumprod, self.timesteps)
        return table_cache(self).get(
            (prediction, scaling, clipped, self.num_inference_steps),
            device,
            dtype,
            sources,
            lambda: lcm_table(*sources, prediction, scaling, clipped, self.num_inference_steps),
        )


def boundary(timesteps: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of each timestep (Luo et al. 2023, Eq. 9), float64 from float32 operations."""
    scaled = timesteps.detach().cpu() * scaling
    skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    out = scaled / (scaled**2 + _SIGMA_DATA**2) ** 0.5
    return skip.double(), out.double()


def lcm_table(
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    prediction_type: str,
    scaling: float,
    clipped: bool,
    num_inference_steps: int,
) -> Tensor:
    """Coefficients of each step; without a clip m is the denoised sample, with one it is x₀.

    Returns:
        float64 ``[N, 10]``.
    """
    alpha = alphas_cumprod.detach().cpu().float()
    steps = timesteps.detach().cpu().long()
    px, po = (value[steps] for value in x0_columns(alpha, prediction_type, "LCMScheduler"))
    blind = blind_rows(alpha, prediction_type, clipped)[steps]
    skip, out = boundary(steps, scaling)
    following = alpha[torch.cat([steps[1:], steps[-1:]])]
    keep, spread = following.sqrt().double(), (1 - following).sqrt().double()
    if len(steps) >= num_inference_steps:
        keep[num_inference_steps - 1], spread[num_inference_steps - 1] = 1.0, 0.0
    keep = torch.where(blind, torch.inf, keep)
    if clipped:
        return columns(len(steps), px=px, po=po, a=keep * skip, b=keep * out, c=spread)
    return columns(len(steps), px=out * px + skip, po=out * po, b=keep, c=spread)
