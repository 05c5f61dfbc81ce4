"""How rows become one value, and what their sum is divided by."""

from __future__ import annotations

import math
from typing import Literal

import torch

__all__ = ["Reduction", "reduction_divisor"]

Reduction = Literal["none", "sum", "mean", "batchmean", "rowmean"]


def reduction_divisor(
    reduction: Reduction, student: torch.Tensor, axis: int, mask: torch.Tensor | None
) -> float | torch.Tensor:
    """What a reduction divides the sum of the rows by."""
    if reduction == "batchmean":
        return float(student.shape[0]) or math.nan  # 0/0, as F.kl_div has it
    if reduction == "mean":
        return float(student.numel()) or math.nan
    if reduction == "rowmean":
        # Counted on the device: no host sync. At least 1, so that nothing unmasked means a loss of 0.
        if mask is not None:
            return mask.sum(dtype=torch.float32).clamp_(min=1.0)
        return float(max(1, math.prod(student.shape[:axis] + student.shape[axis + 1 :])))
    return 1.0
