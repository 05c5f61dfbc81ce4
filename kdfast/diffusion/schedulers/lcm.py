"""Multistep sampling of latent consistency models (Luo et al. 2023, arXiv:2310.04378) over the fused step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.diffusion.schedulers_common import (
    Generators,
    GuidedStep,
    check_same_channels,
    columns,
    diffusers,
    draw_noise,
    noisy,
    table_cache,
    table_dtype,
    unguided,
)
from kdfast.diffusion.schedulers_ddpm import x0_columns
from kdfast.ops import denoise as ops
from kdfast.profiling import annotate

_SIGMA_DATA = 0.5


class LCMScheduler(GuidedStep, diffusers.LCMScheduler):  # type: ignore[misc, name-defined]
    """A drop-in for ``diffusers.LCMScheduler``: same config, same results, one kernel a step.

    The kernel predicts the denoised sample c_out·x₀ + c_skip·x directly; only a clip between the two costs
    another pass.
    """

    @annotate("LCMScheduler.step")
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """One step; arguments and result as in ``diffusers.LCMScheduler.step``.

        Args:
            model_output: The model's prediction, of the sample's shape.
            timestep: One of ``timesteps``; it is read on the first step only.
            sample: x, any strides, which the result keeps.
            generator: Draws the noise, as diffusers would.
            return_dict: False: a tuple (prev_sample, denoised).

        Raises:
            ValueError: No ``set_timesteps`` yet, or shapes that do not fit.
        """
        check_same_channels(sample, model_output)
        return self._fused(
            model_output, timestep, sample, ops.NO_GUIDANCE, generator, None, None, return_dict
        )

    def _fused(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        guide: ops.Guidance,
        generator: Generators,
        noise: Tensor | None,
        seed: int | Tensor | None,
        return_dict: bool,
    ) -> Any:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        config = self.config
        if config.thresholding and config.sample_max_value != 1:
            if noise is not None or seed is not None:
                raise ValueError("variance_noise, seed: not with dynamic thresholding; pass a generator")
            model_output = unguided(model_output, sample, guide)
            return super().step(model_output, timestep, sample, generator, return_dict)
        clip = 1.0 if config.thresholding else config.clip_sample_range if config.clip_sample else None
        if self.step_index is None:
            self._init_step_index(timestep)
        row = int(self.step_index)
        if row != self.num_inference_steps - 1:
            dtype = torch.promote_types(sample.dtype, model_output.dtype)
            noise = draw_noise(model_output, sample, guide, generator, noise, seed, dtype)
        else:
            noise = seed = None
        table = self._table(clip is not None, sample.device, table_dtype(sample, model_output, noise))
        result = ops.denoise_step(
            sample, model_output, table, row, guidance=guide, noise=noise, seed=seed, clip=clip, want_x0=True
        )
        denoised = result.x0
        if clip is not None and denoised is not None:
            c_skip, c_out = self._boundary(row)
            denoised = denoised * c_out + sample * c_skip
        self._step_index += 1
        if not return_dict:
            return result.y, denoised
        return diffusers.schedulers.scheduling_lcm.LCMSchedulerOutput(prev_sample=result.y, denoised=denoised)

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

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t·x₀ + √(1 − ᾱ_t)·ε, as in diffusers; the roots are taken in float32 at least."""
        root, complement = noisy(self.alphas_cumprod, timesteps, original_samples)
        return root * original_samples + complement * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = √ᾱ_t·ε − √(1 − ᾱ_t)·x₀ (Salimans & Ho 2022), as in diffusers."""
        root, complement = noisy(self.alphas_cumprod, timesteps, sample)
        return root * noise - complement * sample


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
    skip, out = boundary(steps, scaling)
    following = alpha[torch.cat([steps[1:], steps[-1:]])]
    keep, spread = following.sqrt().double(), (1 - following).sqrt().double()
    if len(steps) >= num_inference_steps:
        keep[num_inference_steps - 1], spread[num_inference_steps - 1] = 1.0, 0.0
    if clipped:
        return columns(len(steps), px=px, po=po, a=keep * skip, b=keep * out, c=spread)
    return columns(len(steps), px=out * px + skip, po=out * po, b=keep, c=spread)
