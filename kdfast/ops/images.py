"""The image op: registration, gradient, choice of backend.

Its gradient is the same op with ``transposed`` turned, so gradients can be differentiated any number of times.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kdfast.backend import resolve
from kdfast.ops.common.gradients import is_plain
from kdfast.ops.common.registered import registered_op
from kdfast.reference import images as reference

__all__ = ["Crop", "crop_flip"]


class Crop(NamedTuple):
    """What a crop is, beside its tensors.

    Attributes:
        padding: Zeros around the image.
        height: Of the result.
        width: Of the result.
        dtype: Of the result.
        channels_last: Layout of the result.
        transposed: Whether the input is a gradient of crops and the result one of images.
    """

    padding: int
    height: int
    width: int
    dtype: torch.dtype
    channels_last: bool
    transposed: bool = False


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels import images

    return images


def is_channels_last(x: Tensor) -> bool:
    """Whether an image batch lies as NHWC and not also as NCHW."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, crop: Crop) -> Tensor:
    layout = torch.channels_last if crop.channels_last else torch.contiguous_format
    shape = (x.shape[0], x.shape[1], crop.height, crop.width)
    return torch.empty(shape, dtype=crop.dtype, device=x.device, memory_format=layout)


def _run(x: Tensor, offsets: Tensor, flips: Tensor, gain: Tensor, bias: Tensor | None, crop: Crop) -> Tensor:
    if crop.dtype != torch.float64 and resolve(x) == "triton":
        kernels = _kernels()
        out = _empty(x, crop)
        kernels.crop_flip(x, out, offsets, flips, gain, bias, crop.padding, transposed=crop.transposed)
        return out
    return _reference(x, offsets, flips, gain, bias, crop)


def _reference(
    x: Tensor, offsets: Tensor, flips: Tensor, gain: Tensor, bias: Tensor | None, crop: Crop
) -> Tensor:
    out = reference.crop_flip(
        x,
        offsets,
        flips,
        gain,
        bias,
        crop.padding,
        (crop.height, crop.width),
        transposed=crop.transposed,
        dtype=crop.dtype,
    )
    return out.contiguous(memory_format=torch.channels_last) if crop.channels_last else out


def _gradient_of(x: Tensor, crop: Crop) -> Crop:
    """The crop whose result is the gradient of ``x``."""
    return Crop(crop.padding, x.shape[2], x.shape[3], x.dtype, is_channels_last(x), not crop.transposed)


class _CropFlip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offsets: Tensor, flips: Tensor, gain: Tensor, bias: Tensor | None, crop: Crop
    ) -> Tensor:
        ctx.save_for_backward(offsets, flips, gain)
        ctx.back = _gradient_of(x, crop)
        return _run(x, offsets, flips, gain, bias, crop)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        offsets, flips, gain = ctx.saved_tensors
        return crop_flip(upstream, offsets, flips, gain, None, ctx.back), None, None, None, None, None


def crop_flip(
    x: Tensor, offsets: Tensor, flips: Tensor, gain: Tensor, bias: Tensor | None, crop: Crop
) -> Tensor:
    """Crops of images, flipped and mapped by channel; arguments are checked by the caller.

    Args:
        x: ``[B, C, H, W]``, uint8 or floating-point.
        offsets: int32 or int64 ``[B, 2]``, contiguous.
        flips: bool or integers ``[B]``, contiguous.
        gain: ``[C]``, float32 (float64 for results in float64), contiguous; gets no gradient.
        bias: Likewise, or None for zeros.
        crop: The rest.
    """
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.kdfast.crop_flip(x, offsets, flips, gain, bias, *crop))
    if not is_plain(x, x):
        return _reference(x, offsets, flips, gain, bias, crop)
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _CropFlip.apply(x, offsets, flips, gain, bias, crop))  # type: ignore[no-untyped-call]
    return _run(x, offsets, flips, gain, bias, crop)


# --- the registered form -------------------------------------------------------------------------------------


_SCHEMA = (
    "(Tensor x, Tensor offsets, Tensor flips, Tensor gain, Tensor? bias, SymInt padding, SymInt height, SymInt width, "
    "ScalarType dtype, bool channels_last, bool transposed) -> Tensor"
)


@registered_op("crop_flip", _SCHEMA)
def _op(x: Tensor, offsets: Tensor, flips: Tensor, gain: Tensor, bias: Tensor | None, *crop: Any) -> Tensor:
    return _run(x, offsets, flips, gain, bias, Crop(*crop))


@_op.register_fake
def _(x: Tensor, *flat: Any) -> Tensor:
    return _empty(x, Crop(*flat[4:]))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, flips, gain, _, *crop = inputs
    ctx.save_for_backward(offsets, flips, gain)
    ctx.back = _gradient_of(x, Crop(*crop))


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    grad: Tensor = _op(upstream, *ctx.saved_tensors, None, *ctx.back)
    return (grad, *[None] * 10)


_op.register_autograd(_backward, setup_context=_context)
