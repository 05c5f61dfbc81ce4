"""The denoising step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kdfast.documents import shown
from kdfast.functional._checks import check_floating, check_int, check_real, check_tensor
from kdfast.ops import denoise as ops
from kdfast.profiling import annotate

Order = Literal["cond_uncond", "uncond_cond"]


def guidance(
    scale: float | None, order: Order = "cond_uncond", cfg_channels: int | None = None
) -> ops.Guidance:
    """How a batched model output is read.

    Args:
        scale: Guidance scale, or None for one output a sample.
        order: Which half comes first: the conditional (DiT) or the unconditional (Stable Diffusion).
        cfg_channels: Channels that are guided; None: all.

    Raises:
        ValueError: Another ``order``, a scale that is not finite, or less than 0 channels.
        TypeError: A scale that is not a number.
    """
    if not isinstance(order, str) or order not in ("cond_uncond", "uncond_cond"):
        raise ValueError(f"order: must be 'cond_uncond' or 'uncond_cond', got {shown(order)}")
    if scale is None:
        return ops.NO_GUIDANCE
    if cfg_channels is not None:
        check_int("cfg_channels", cfg_channels, 0)
    try:
        factor = math.nan if isinstance(scale, (str, bytes, bool)) else float(scale)
    except OverflowError:
        factor = math.inf
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        factor = math.nan
    if math.isfinite(factor):
        check_real("guidance_scale", factor)  # in float32, too
        return ops.Guidance(factor, order == "cond_uncond", cfg_channels)
    if isinstance(scale, (int, float, Tensor)) and not isinstance(scale, bool):
        raise ValueError(f"guidance_scale: must be finite, got {shown(scale)}")
    raise TypeError(f"guidance_scale: must be a number or None, got {type(scale).__name__}")


def check_clip(clip: float | None) -> float | None:
    """The bound of the predicted x₀.

    Raises:
        ValueError: It is not above 0 (a clamp to nothing), or not finite.
        TypeError: It is no number.
    """
    if clip is None:
        return None
    number = check_real("clip", clip)
    if number <= 0:
        raise ValueError(f"clip: got {clip}; a finite number above 0, or None, is needed")
    return number


@annotate("denoise_step")
def denoise_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    step: int | Tensor,
    *,
    guidance_scale: float | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    order: Order = "cond_uncond",
    cfg_channels: int | None = None,
    clip: float | None = None,
    history: Sequence[Tensor] = (),
) -> Tensor:
    """One step of any linear diffusion sampler, fused with classifier-free guidance.

    With the coefficients px, po, a, b, d, d1, d2, d3, c, s of row ``step``::

        o = u + g·(c − u)                       guidance (Ho & Salimans 2022, Eq. 6), if g is given
        m = clamp(px·x + po·o)                  predicted x₀ (Song et al. 2021, Eq. 12)
        y = a·x + b·m + d·o + Σ d_j·h_j + c·z

    Args:
        sample: x ``[B, C, …]``, any strides, floating-point.
        model_output: o, of the sample's shape (or broadcast against it), with ``guidance_scale``
            ``[2B, C, …]``. Channels after C (a learned variance) are not read.
        coefficients: float32 ``[steps, 10]``, float64 for float64 inputs, on the sample's device.
        step: Row of ``coefficients``: an int, or an integer tensor of one element on the sample's device,
            which is read there without a synchronisation (outside the table: NaN on a GPU).
        guidance_scale: g. With it the sample may also have 2B rows, one for each half.
        noise: z, of the sample's shape.
        seed: Make z in the kernel: Philox normals keyed by (seed, step, element). An int ≥ 0, or an int64
            tensor on the sample's device, so that a captured graph sees its current value. With one element
            for each row of the sample, each row has a key of its own and its elements count from its first:
            a row's noise does not depend on the batch that it is in.
        order: ``"cond_uncond"`` (DiT) or ``"uncond_cond"`` (Stable Diffusion): which half is which.
        cfg_channels: Guide only the first channels; the rest is the conditional half's.
        clip: Clamp the predicted x₀ to ±clip, a finite number above 0. Its subgradient is 1 at ±clip, 0 outside.
        history: Up to three tensors h_j.

    Returns:
        y in the promoted dtype of the inputs, with the sample's strides. Differentiable, any number of times,
        in ``sample``, ``model_output``, ``noise`` and ``history``.

    Raises:
        ValueError: Shapes, devices, dtypes or a step that do not fit together; a scale or clip that is not finite.
        TypeError: Inputs that are no dense floating-point tensors; a scale, step, seed or clip that is no number.
    """
    _check_types(sample, model_output, coefficients, step, noise, seed, history)
    return ops.denoise_step(
        sample,
        model_output,
        coefficients,
        step,
        guidance=guidance(guidance_scale, order, cfg_channels),
        history=history,
        noise=noise,
        seed=seed,
        clip=check_clip(clip),
    ).y


def _check_types(
    sample: Any, model_output: Any, coefficients: Any, step: Any, noise: Any, seed: Any, history: Any
) -> None:
    """What the op takes for granted; sizes, dtypes that go together and devices are its own to check."""
    check_floating("sample", sample)
    check_floating("model_output", model_output)
    check_floating("coefficients", coefficients, "a table of floating-point numbers")
    if noise is not None:
        check_floating("noise", noise)
    if not isinstance(history, (tuple, list)):
        raise TypeError(f"history: got {type(history).__name__}; a sequence of tensors is needed")
    for number, tensor in enumerate(history):
        check_floating(f"history[{number}]", tensor)
    if isinstance(step, Tensor):
        check_tensor("step", step)
        if step.dtype == torch.bool or step.is_complex():
            raise TypeError(f"step: got dtype {step.dtype}; an integer dtype is needed")
    else:
        check_int("step", step, 0)
    if isinstance(seed, Tensor):
        check_tensor("seed", seed)
    elif seed is not None:
        if isinstance(seed, int) and seed < 0:
            raise ValueError(f"seed: must be at least 0, got {shown(seed)}")
        check_int("seed", seed, 0)
