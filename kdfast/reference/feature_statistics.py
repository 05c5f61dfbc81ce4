"""Batch-norm statistics in plain PyTorch: the oracle of the tests and the path for CPU and float64."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.reference.losses import compute_dtype

__all__ = ["bn_statistics"]


def bn_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    average_mean: Tensor | None,
    average_var: Tensor | None,
    share: Tensor | None,
    *,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, mean, var)``; the equations and arguments of kernels/feature_statistics.py. All differentiable in x."""
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(wide, dims, correction=0)
    gap_mean, gap_var = running_mean.to(dtype) - mean, running_var.to(dtype) - var
    if average_mean is not None and average_var is not None and share is not None:
        k = share.to(dtype)
        gap_mean = torch.lerp(gap_mean, running_mean.to(dtype) - average_mean.to(dtype), k)
        gap_var = torch.lerp(gap_var, running_var.to(dtype) - average_var.to(dtype), k)
    if squared:
        return gap_mean.square().sum() + gap_var.square().sum(), mean, var
    return torch.linalg.vector_norm(gap_mean) + torch.linalg.vector_norm(gap_var), mean, var
