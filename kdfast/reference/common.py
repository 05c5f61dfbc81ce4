"""What the references of several families share: the dtype they compute in, row factors, masked rows."""

from __future__ import annotations

import torch

__all__ = ["NEAR", "compute_dtype", "finish", "without_masked"]

#: Below this |δ| the divergence is accumulated as p·(δ + expm1(-δ)), above it as p·δ + (q - p).
NEAR = 0.5


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 when any input is float64, else float32: half types are widened once, on reading."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def finish(
    rows: torch.Tensor,
    temperature: torch.Tensor | float,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: torch.Tensor | float,
    reduce: bool,
) -> torch.Tensor:
    """T²·weight/divisor times each row, 0 where the mask is False; summed to a 0-d tensor when ``reduce``."""
    rows = rows * (temperature * temperature)
    if row_weight is not None:
        rows = rows * row_weight.to(rows.dtype)
    if mask is not None:
        rows = rows.masked_fill(~mask, 0.0)
    return (rows.sum() if reduce else rows) / divisor  # the sum of no rows over 0 is NaN, as in torch


def without_masked(mask: torch.Tensor | None, dim: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same logits with rows that do not count set to 0: whatever they hold, nothing comes of it."""
    if mask is None:
        return tensors
    drop = ~mask.unsqueeze(dim)
    return tuple(tensor.masked_fill(drop, 0.0) for tensor in tensors)
