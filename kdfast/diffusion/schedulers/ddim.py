"""DDIM (Song et al. 2021, arXiv:2010.02502) over the fused denoising step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.diffusion.schedulers.base import FusedStep, Generators, Request, VariancePreserving
from kdfast.diffusion.schedulers.common import (
    BIG,
    check_same_channels,
    clip_bound,
    columns,
    diffusers,
    needs_quantiles,
    row_of,
    table_cache,
    table_dtype,
)
from kdfast.diffusion.schedulers.ddpm import blind_rows
from kdfast.functional.denoise import Order, guidance
from kdfast.profiling import annotate

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class DDIMScheduler(FusedStep, VariancePreserving, diffusers.DDIMScheduler):  # type: ignore[misc, name-defined]
    """A drop-in for ``diffusers.DDIMScheduler``: same config, same results, one kernel a step.

    Beside :meth:`step` there is :meth:`step_cfg`, which takes the model's doubled output and does
    classifier-free guidance in the same pass. Timesteps on a GPU are read there, without a synchronisation.

    Attributes:
        keep_pred_original: False leaves ``pred_original_sample`` None: a quarter less traffic.
    """

    OUTPUT = diffusers.schedulers.scheduling_ddim.DDIMSchedulerOutput
    keep_pred_original: bool = True

    @annotate("DDIMScheduler.step")
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step back in time; arguments and result as in ``diffusers.DDIMScheduler.step``.

        Args:
            model_output: The model's prediction, of the sample's shape.
            timestep: t, an int or a tensor of one element on any device.
            sample: x_t, any strides, which the result keeps.
            eta: η of Eq. 16; 0 draws no noise and leaves the generator alone.
            use_clipped_model_output: Derive ε again from the clipped x₀.
            generator: Draws the noise, as diffusers would.
            variance_noise: The noise itself, instead.
            return_dict: False: a tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: No ``set_timesteps`` yet, or both ``generator`` and ``variance_noise`` with eta > 0.
        """
        check_same_channels(sample, model_output)
        request = Request(
            model_output,
            timestep,
            sample,
            generator=generator,
            noise=variance_noise,
            return_dict=return_dict,
        )
        return self._ddim(request, eta, use_clipped_model_output)

    @annotate("DDIMScheduler.step_cfg")
    def step_cfg(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        guidance_scale: float,
        *,
        order: Order = "cond_uncond",
        cfg_channels: int | None = None,
        eta: float = 0.0,
        generator: Generators = None,
        use_clipped_model_output: bool = False,
        variance_noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Classifier-free guidance and :meth:`step` in one pass.

        Args:
            model_output: Both halves of the batch ``[2B, ≥ C, …]``; channels after C are not read.
            timestep: As in :meth:`step`.
            sample: x_t ``[B, C, …]``, or ``[2B, C, …]`` with a row for each half; the result matches it.
            guidance_scale: g of u + g·(c − u).
            order: Which half is first: the conditional (DiT) or the unconditional (Stable Diffusion).
            cfg_channels: Guide only the first channels (DiT's authors: 3); None: all. The others come from
                the conditional half or, for a sample of 2B rows, each from its own.
            eta: As in :meth:`step`.
            generator: As in :meth:`step`; noise has the sample's shape.
            use_clipped_model_output: As in :meth:`step`.
            variance_noise: As in :meth:`step`.
            seed: Make the noise in the kernel instead, keyed by (seed, timestep, element): an int, or an
                int64 tensor of one element on the sample's device.
            return_dict: As in :meth:`step`.

        Raises:
            ValueError: Shapes that do not fit, an unknown ``order``, or two sources of noise.
        """
        guide = guidance(guidance_scale, order, cfg_channels)
        request = Request(model_output, timestep, sample, guide, generator, variance_noise, seed, return_dict)
        return self._ddim(request, eta, use_clipped_model_output)

    def _ddim(self, request: Request, eta: float, use_clipped: bool) -> Any:
        self._check_timesteps()
        if needs_quantiles(self.config):
            return self._plain_step(
                request, eta, use_clipped, request.generator, request.noise, takes_noise=True
            )
        clip = clip_bound(self.config)
        request = request.draw() if eta > 0 else request.silent()
        dtype, device = table_dtype(*request.tensors()), request.sample.device
        result = self._run(
            request,
            self._table(eta, use_clipped, clip is not None, device, dtype),
            row_of(request.timestep, device),
            clip=clip,
            want_x0=self.keep_pred_original,
        )
        return self._answer(request, result.y, result.x0)

    def _table(
        self, eta: float, use_clipped: bool, clipped: bool, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Coefficients of every training timestep, so that a slice of ``timesteps`` finds its own."""
        prediction = self.config.prediction_type
        if prediction not in _PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type: must be one of {', '.join(_PREDICTION_TYPES)}, got {prediction!r}"
            )
        stride = self.config.num_train_timesteps // self.num_inference_steps
        sources = (self.alphas_cumprod, self.final_alpha_cumprod)
        return table_cache(self).get(
            (prediction, stride, float(eta), use_clipped, clipped),
            device,
            dtype,
            sources,
            lambda: ddim_table(*sources, stride, prediction, float(eta), use_clipped, clipped),
        )


def ddim_table(
    alphas_cumprod: Tensor,
    final_alpha_cumprod: Tensor,
    stride: int,
    prediction_type: str,
    eta: float,
    use_clipped: bool,
    clipped: bool,
) -> Tensor:
    """Coefficients of DDIM for each t, prev = t − stride (Song et al. 2021, Eqs. 12 and 16).

    The schedule and its roots are taken in float32, in diffusers' order of operations (float64 would be off
    by up to 8e-5 from it); quotients and products of them in float64.

    Returns:
        float64 ``[T, 10]``.
    """
    alpha = alphas_cumprod.detach().cpu().float()
    previous = torch.arange(len(alpha)) - stride
    alpha_prev = torch.where(
        previous >= 0, alpha[previous.clamp(min=0)], final_alpha_cumprod.detach().cpu().float()
    )
    beta = 1 - alpha
    variance = ((1 - alpha_prev) / beta) * (1 - alpha / alpha_prev)
    sigma32 = eta * variance**0.5
    squared = 1 - alpha_prev - sigma32**2
    if eta <= 1:
        squared = squared.clamp(min=0)  # it is 0 in exact arithmetic where rounding makes it negative
    root, co_root, root_prev, direction, sigma = (
        value.double() for value in (alpha**0.5, beta**0.5, alpha_prev**0.5, squared**0.5, sigma32)
    )
    zero = torch.zeros_like(root)
    blind = root == 0  # zero terminal SNR: ε alone does not determine x₀
    if prediction_type == "epsilon":
        px = torch.where(blind, BIG, 1 / root)
        po = torch.where(blind, -co_root * BIG, -co_root / root)
        a, d = zero, direction
    elif prediction_type == "sample":
        px, po = zero, torch.ones_like(root)
        a, d = direction / co_root, -direction * root / co_root
    else:
        px, po = root, -co_root
        a, d = direction * co_root, direction * root
    b = root_prev
    if use_clipped:
        a, b, d = direction / co_root, root_prev - direction * root / co_root, zero
    # Unclamped, x₀ is infinite there (and ε derived from it undefined), and so is the result.
    b = torch.where(blind_rows(alpha, prediction_type, clipped), torch.nan if use_clipped else torch.inf, b)
    return columns(len(alpha), px=px, po=po, a=a, b=b, d=d, c=sigma if eta > 0 else zero)
