"""Activations of any network as maps ``[B, C, H, W]`` of one size."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from kdfast.methods.diffkd.config import Layout, Resize

__all__ = ["as_map", "fit"]


def as_map(x: Tensor, layout: Layout, layer: str) -> Tensor:
    """An activation as ``[B, C, H, W]``; a view, which is not copied.

    Args:
        x: ``[B, C]``, tokens ``[B, N, C]``, ``[B, C, H, W]`` or ``[B, H, W, C]``.
        layout: Of a 4-d activation, see :class:`~kdfast.methods.diffkd.Pair`.
        layer: For messages.

    Raises:
        ValueError: It has another rank, is no floating-point tensor, or its tokens form no square.
    """
    if not x.is_floating_point():
        raise ValueError(f"pairs: {layer!r} gave {x.dtype}; a floating-point activation is needed")
    if x.dim() == 2:
        return x[:, :, None, None]
    if x.dim() == 3:
        side = math.isqrt(x.shape[1])
        extra = x.shape[1] - side * side
        if side == 0 or extra > 1:
            raise ValueError(
                f"pairs: {layer!r} gave shape {tuple(x.shape)}; tokens [B, N, C] must form a square, after one class "
                "token at most"
            )
        return x[:, extra:].unflatten(1, (side, side)).movedim(-1, 1)
    if x.dim() != 4:
        raise ValueError(
            f"pairs: {layer!r} gave shape {tuple(x.shape)}; accepted: [B, C], [B, N, C], [B, C, H, W], [B, H, W, C]"
        )
    last = layout == "channels_last" or (
        layout == "auto" and x.shape[1] == x.shape[2] and x.shape[3] != x.shape[2]
    )
    return x.movedim(-1, 1) if last else x


def fit(student: Tensor, size: tuple[int, int], resize: Resize, layers: str) -> Tensor:
    """A student's map ``[B, C, h, w]`` in the teacher's size.

    Averaged over areas in a direction in which it is larger, then bilinear in one in which it is smaller.

    Raises:
        ValueError: The sizes differ and ``resize`` is ``"refuse"``.
    """
    have = (student.shape[2], student.shape[3])
    if have == size:
        return student
    if resize == "refuse":
        raise ValueError(
            f"pairs: {layers} are {have[0]}×{have[1]} and {size[0]}×{size[1]}; sizes must match with "
            "resize='refuse' (or set resize to 'student')"
        )
    smaller = (min(have[0], size[0]), min(have[1], size[1]))
    if smaller != have:
        student = F.adaptive_avg_pool2d(student, smaller)
    if smaller != size:
        student = F.interpolate(student, size=size, mode="bilinear", align_corners=False)
    return student
