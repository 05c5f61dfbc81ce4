"""Crop, flip and normalise in plain PyTorch: the oracle of the tests and the path for CPU and float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["crop_flip"]


def crop_flip(
    x: Tensor,
    offsets: Tensor,
    flips: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    padding: int,
    size: tuple[int, int],
    *,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """What kernels/images writes, ``[B, C, *size]``; its equations and arguments.

    A gather whose rows and columns are the samples' own: differentiable in x, and by itself when transposed.
    """
    compute = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    batch, channels, height, width = x.shape
    down, right = (offsets.to(torch.int64) - padding).unbind(1)
    rows = torch.arange(size[0], device=x.device).expand(batch, -1)
    columns = torch.arange(size[1], device=x.device).expand(batch, -1)
    turned = flips.to(torch.bool)[:, None]
    if transposed:
        rows, columns = rows - down[:, None], columns - right[:, None]
        columns = torch.where(turned, width - 1 - columns, columns)
    else:
        rows, columns = (
            rows + down[:, None],
            torch.where(turned, size[1] - 1 - columns, columns) + right[:, None],
        )
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    # A zero behind each channel's pixels is what lies outside.
    at = torch.where(inside, rows[:, :, None] * width + columns[:, None, :], height * width)
    pixels = F.pad(x.reshape(batch, channels, height * width), (0, 1))
    picked = pixels.gather(2, at.flatten(1)[:, None].expand(-1, channels, -1)).view(batch, channels, *size)
    value = picked.to(compute) * gain.to(compute).view(-1, 1, 1)
    return (value if bias is None else value.add_(bias.to(compute).view(-1, 1, 1))).to(dtype)
