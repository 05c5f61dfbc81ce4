"""DDPM's ancestral sampler (Ho et al. 2020; Nichol & Dhariwal 2021) over the fused denoising step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from kdfast.diffusion.schedulers.base import DrawnStep, Request, VariancePreserving
from kdfast.diffusion.schedulers.common import (
    BIG,
    clip_bound,
    columns,
    diffusers,
    needs_quantiles,
    row_of,
    table_cache,
    table_dtype,
)
from kdfast.ops import denoise as ops


class DDPMScheduler(DrawnStep, VariancePreserving, diffusers.DDPMScheduler):  # type: ignore[misc, name-defined]
    """A drop-in for ``diffusers.DDPMScheduler``: same config, same results, one kernel a step.

    A learned range of variances is read beside the prediction, in the same pass. With a timestep on a GPU,
    which is not waited for, noise is drawn at t = 0 too, and multiplied by 0.

    Attributes:
        keep_pred_original: Set to False to leave ``pred_original_sample`` None.
    """

    OUTPUT = diffusers.schedulers.scheduling_ddpm.DDPMSchedulerOutput
    keep_pred_original: bool = True

    def _has_plain_output(self) -> bool:
        return not self.variance_type.startswith("learned")

    def _fused(self, request: Request) -> Any:
        if needs_quantiles(self.config):
            return self._plain_step(request, request.generator, takes_noise=False)
        row = row_of(request.timestep, request.sample.device)
        table = self._table(request.sample.device, table_dtype(*request.tensors()))
        if isinstance(row, int) and not (0 <= row < len(table) and self._listed(row)):
            raise ValueError(f"timestep: must be one of the scheduler's timesteps, got {row}")
        request = request.silent() if isinstance(row, int) and row == 0 else request.draw()
        if self.variance_type == "learned" and request.noisy:
            request = self._learned_noise(request)
        ranged = self.variance_type == "learned_range" and request.noisy
        if not self._has_plain_output() and not ranged:
            # The variance's channels have been used, or are not needed; a sample of one would take them for its own.
            request = request._replace(model_output=request.model_output[:, : request.sample.shape[1]])
        result = self._run(
            request,
            table,
            row,
            learned_variance=ranged,
            clip=clip_bound(self.config),
            want_x0=self.keep_pred_original,
        )
        return self._answer(request, result.y, result.x0)

    def _learned_noise(self, request: Request) -> Request:
        """√v·z, where the model predicts the variance v itself."""
        if request.noise is None:
            raise ValueError("seed: not with variance_type 'learned'; pass a generator or variance_noise")
        variance = ops.predicted_variance(request.model_output, request.sample, request.guide)
        return request._replace(noise=variance**0.5 * request.noise, seed=None)

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
        clipped = clip_bound(self.config) is not None
        return table_cache(self).get(
            (prediction, variance, listed, clipped),
            device,
            dtype,
            sources,
            lambda: ddpm_table(
                self.alphas_cumprod, self._previous() if listed else None, prediction, variance, clipped
            ),
        )


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


def blind_rows(alpha: Tensor, prediction_type: str, clipped: bool) -> Tensor:
    """Timesteps at which the step is infinite, ``[T]``: ε alone does not determine x₀ where ᾱ = 0.

    Warns if there are any, and says what to do.
    """
    blind = alpha == 0
    if prediction_type != "epsilon" or clipped or not bool(blind.any()):
        return torch.zeros_like(blind)
    warnings.warn(
        "prediction_type 'epsilon' at zero terminal SNR (rescale_betas_zero_snr): an image that is all noise says "
        f"nothing of x₀, so the step from timestep {int(blind.nonzero()[-1])} is infinite; use v_prediction, or clip",
        stacklevel=2,
    )
    return blind


def ddpm_table(
    alphas_cumprod: Tensor,
    previous: dict[int, int] | None,
    prediction_type: str,
    variance_type: str,
    clipped: bool = True,
) -> Tensor:
    """Coefficients of DDPM for each t (Ho et al. 2020, Eq. 7), in diffusers' order of operations.

    Args:
        alphas_cumprod: ᾱ ``[T]``.
        previous: t → the timestep after it, −1 at the end; None: t − 1. Other rows are NaN.
        prediction_type: What the model predicts.
        clipped: Whether x₀ is clamped, which makes up for ε at zero terminal SNR.
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
    b = torch.where(blind_rows(alpha, prediction_type, clipped), torch.inf, b)
    table = columns(len(alpha), px=px, po=po, a=a, b=b, c=c, d3=slope)
    table[before == -2] = float("nan")
    return table
