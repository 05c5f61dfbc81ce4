"""DDPM's ancestral sampler (Ho et al. 2020; Nichol & Dhariwal 2021) over the fused denoising step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.diffusion.schedulers_common import (
    BIG,
    Generators,
    GuidedStep,
    check_same_channels,
    columns,
    diffusers,
    draw_noise,
    noisy,
    row_of,
    table_cache,
    table_dtype,
    unguided,
)
from kdfast.ops import denoise as ops
from kdfast.profiling import annotate


class DDPMScheduler(GuidedStep, diffusers.DDPMScheduler):  # type: ignore[misc, name-defined]
    """A drop-in for ``diffusers.DDPMScheduler``: same config, same results, one kernel a step.

    A learned range of variances is read beside the prediction, in the same pass. With a timestep on a GPU,
    which is not waited for, noise is drawn at t = 0 too, and multiplied by 0.

    Attributes:
        keep_pred_original: Set to False to leave ``pred_original_sample`` None.
    """

    keep_pred_original: bool = True

    @annotate("DDPMScheduler.step")
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """One step back in time; arguments and result as in ``diffusers.DDPMScheduler.step``.

        Args:
            model_output: The model's prediction, of the sample's shape; with a learned variance, twice its
                channels.
            timestep: t, one of ``timesteps``: an int or a tensor of one element on any device.
            sample: x_t, any strides, which the result keeps.
            generator: Draws the noise, as diffusers would.
            return_dict: False: a tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: A timestep that is not one of ``timesteps``, or shapes that do not fit.
        """
        if not self.variance_type.startswith("learned"):
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
        config = self.config
        if config.thresholding and config.sample_max_value != 1:
            if noise is not None or seed is not None:
                raise ValueError("variance_noise, seed: not with dynamic thresholding; pass a generator")
            model_output = unguided(model_output, sample, guide)
            return super().step(model_output, timestep, sample, generator, return_dict)
        clip = 1.0 if config.thresholding else config.clip_sample_range if config.clip_sample else None
        row = row_of(timestep, sample.device)
        dtype = table_dtype(sample, model_output, noise)
        table = self._table(sample.device, dtype)
        if isinstance(row, int) and not (0 <= row < len(table) and self._listed(row)):
            raise ValueError(f"timestep: must be one of the scheduler's timesteps, got {row}")
        if isinstance(row, int) and row == 0:
            noise = seed = None
        else:
            noise = draw_noise(model_output, sample, guide, generator, noise, seed)
        learned = self.variance_type == "learned_range" and (noise is not None or seed is not None)
        if self.variance_type == "learned" and (noise is not None or seed is not None):
            noise, seed = self._learned_noise(model_output, sample, guide, noise, seed), None
        result = ops.denoise_step(
            sample,
            model_output,
            table,
            row,
            guidance=guide,
            noise=noise,
            seed=seed,
            learned_variance=learned,
            clip=clip,
            want_x0=self.keep_pred_original,
        )
        if not return_dict:
            return result.y, result.x0
        return diffusers.schedulers.scheduling_ddpm.DDPMSchedulerOutput(
            prev_sample=result.y, pred_original_sample=result.x0
        )

    def _learned_noise(
        self,
        model_output: Tensor,
        sample: Tensor,
        guide: ops.Guidance,
        noise: Tensor | None,
        seed: int | Tensor | None,
    ) -> Tensor:
        """√v·z, where the model predicts the variance v itself."""
        if noise is None:
            raise ValueError("seed: not with variance_type 'learned'; pass a generator or variance_noise")
        return ops.predicted_variance(model_output, sample, guide) ** 0.5 * noise

    def _listed(self, t: int) -> bool:
        if not (self.custom_timesteps or self.num_inference_steps):
            return True
        return t in self._previous()

    def _previous(self) -> dict[int, int]:
        """t → the next of ``timesteps``, −1 after the last; one read of the device a ``set_timesteps``."""
        cached = self.__dict__.get("_kdfast_previous")
        if cached is None or cached[0] is not self.timesteps:
            steps = [int(t) for t in self.timesteps.tolist()]
            pairs = list(zip(steps, [*steps[1:], -1], strict=True))
            # The first of equal timesteps counts, as in diffusers.
            cached = self.__dict__["_kdfast_previous"] = (self.timesteps, dict(reversed(pairs)))
        return cached[1]

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        prediction, variance = self.config.prediction_type, self.variance_type
        listed = bool(self.custom_timesteps or self.num_inference_steps)
        sources = (self.alphas_cumprod, self.timesteps)
        return table_cache(self).get(
            (prediction, variance, listed),
            device,
            dtype,
            sources,
            lambda: ddpm_table(
                self.alphas_cumprod, self._previous() if listed else None, prediction, variance
            ),
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t·x₀ + √(1 − ᾱ_t)·ε, as in diffusers; the roots are taken in float32 at least."""
        root, complement = noisy(self.alphas_cumprod, timesteps, original_samples)
        return root * original_samples + complement * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = √ᾱ_t·ε − √(1 − ᾱ_t)·x₀ (Salimans & Ho 2022), as in diffusers."""
        root, complement = noisy(self.alphas_cumprod, timesteps, sample)
        return root * noise - complement * sample


def x0_columns(alpha: Tensor, prediction_type: str, scheduler: str) -> tuple[Tensor, Tensor]:
    """px and po of a variance-preserving schedule, float64, from ᾱ in float32.

    Raises:
        ValueError: An unknown prediction type.
    """
    root, co_root = (alpha**0.5).double(), ((1 - alpha) ** 0.5).double()
    if prediction_type == "epsilon":
        blind = root == 0
        return torch.where(blind, BIG, 1 / root), torch.where(blind, -co_root * BIG, -co_root / root)
    if prediction_type == "sample":
        return torch.zeros_like(root), torch.ones_like(root)
    if prediction_type == "v_prediction":
        return root, -co_root
    raise ValueError(
        f"prediction_type: {scheduler} takes epsilon, sample or v_prediction, got {prediction_type!r}"
    )


def ddpm_table(
    alphas_cumprod: Tensor, previous: dict[int, int] | None, prediction_type: str, variance_type: str
) -> Tensor:
    """Coefficients of DDPM for each t (Ho et al. 2020, Eq. 7), in diffusers' order of operations.

    Args:
        alphas_cumprod: ᾱ ``[T]``.
        previous: t → the timestep after it, −1 at the end; None: t − 1. Other rows are NaN.
        prediction_type: What the model predicts.
        variance_type: Of diffusers' names; for ``"learned_range"`` c and d3 hold log σ and its slope in v.

    Returns:
        float64 ``[T, 10]``.
    """
    alpha = alphas_cumprod.detach().cpu().float()
    steps = torch.arange(len(alpha))
    before = steps - 1 if previous is None else torch.tensor([previous.get(int(t), -2) for t in steps])
    alpha_prev = torch.where(before >= 0, alpha[before.clamp(min=0)], torch.tensor(1.0))
    beta, beta_prev = 1 - alpha, 1 - alpha_prev
    current_alpha = alpha / alpha_prev
    current_beta = 1 - current_alpha
    b = (alpha_prev**0.5 * current_beta) / beta
    a = current_alpha**0.5 * beta_prev / beta
    small = torch.clamp(beta_prev / beta * current_beta, min=1e-20)
    slope = torch.zeros_like(alpha)
    if variance_type == "fixed_small":
        c = small**0.5
    elif variance_type == "fixed_small_log":
        c = torch.exp(0.5 * torch.log(small))
    elif variance_type in ("fixed_large", "fixed_large_log"):
        c = current_beta**0.5  # diffusers takes the root of the logarithm in the second case, which is NaN
    elif variance_type == "learned":
        c = torch.ones_like(alpha)
    elif variance_type == "learned_range":
        low, high = torch.log(small).double(), torch.log(current_beta).double()
        c, slope = (high + low) / 4, (high - low) / 4
    else:
        raise ValueError(f"variance_type: {variance_type!r} is not known to DDPMScheduler")
    c[0], slope[0] = (-float("inf"), 0.0) if variance_type == "learned_range" else (0.0, 0.0)
    px, po = x0_columns(alpha, prediction_type, "DDPMScheduler")
    table = columns(len(alpha), px=px, po=po, a=a, b=b, c=c, d3=slope)
    table[before == -2] = float("nan")
    return table
