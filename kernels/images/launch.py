"""The launch of crop, flip and normalise; the equation is in the package."""

from __future__ import annotations

import torch
import triton

from ..launch import MAX_GRID_Y, Launches, Planned
from .bodies import crop_flip_kernel
from .plan import images_plan


def crop_flip(
    x: torch.Tensor,
    y: torch.Tensor,
    offsets: torch.Tensor,
    flips: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
    padding: int,
    *,
    transposed: bool,
) -> None:
    """Launch once, into ``y``.

    Args:
        x: Read: ``[B, C, H, W]``, any strides; the images, or (transposed) the crops' gradient.
        y: Written: ``[B, C, h, w]``, dense as NCHW or as NHWC; the crops, or the images' gradient.
        offsets: ``[B, 2]``, contiguous integers: top and left of the crop in the padded image.
        flips: ``[B]``, contiguous, bool or integers.
        gain: float32 ``[C]``.
        bias: float32 ``[C]``, or None for zeros.
        padding: Zeros around the image.
        transposed: Whether this is the gradient.
    """
    if y.numel() == 0:
        return
    geometry = (x.shape, x.stride(), y.shape, not y.is_contiguous(), padding, transposed)
    _CROP_FLIP(x.device, geometry, (x, y, offsets, flips, gain, bias))


def _planned(
    read: tuple[int, ...],
    strides: tuple[int, ...],
    written: tuple[int, ...],
    channels_last: bool,
    padding: int,
    transposed: bool,
) -> Planned:
    batch, channels, height, width = written
    numel = channels * height * width
    plan = images_plan(numel)
    reach = sum(stride * (size - 1) for stride, size in zip(strides[1:], read[1:], strict=True))
    constants = {
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "CHANNELS_LAST": channels_last,
        "TRANSPOSED": transposed,
        "WIDE": max(reach, numel) >= 2**31 - 2**16,
        "BLOCK": plan.block,
        "num_warps": plan.num_warps,
        "enable_fp_fusion": True,
    }
    grid = (triton.cdiv(numel, plan.block), min(batch, MAX_GRID_Y))
    return grid, (batch, padding, *strides, read[2], read[3], numel), constants


_CROP_FLIP = Launches(crop_flip_kernel, _planned)
