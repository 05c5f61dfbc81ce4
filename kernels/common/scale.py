"""What multiplies a row's loss, and how it and strides travel to a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Scale(NamedTuple):
    """What multiplies a row's divergence: T²·weight/divisor, zero where the mask is False.

    ``temperature`` and ``divisor`` are floats, or 0-d tensors on the device that are read by the kernel, so
    that a captured graph sees their current values. ``weight`` and ``mask`` hold one value a row, contiguous.
    """

    temperature: torch.Tensor | float
    divisor: torch.Tensor | float
    weight: torch.Tensor | None
    mask: torch.Tensor | None


def value_and_pointer(value: torch.Tensor | float) -> tuple[float, torch.Tensor | None]:
    """A number and where it lies in memory, one of which a kernel uses."""
    return (1.0, value) if isinstance(value, torch.Tensor) else (float(value), None)
