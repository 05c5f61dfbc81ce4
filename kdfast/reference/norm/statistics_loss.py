"""Batch-norm statistics in plain PyTorch: the oracle of the tests and the path for CPU and float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.reference.common import compute_dtype

__all__ = ["Target", "bn_statistics", "bn_statistics_closed", "bn_statistics_gradient"]


class Target(NamedTuple):
    """What a batch's statistics are compared with; nothing of it gets a gradient.

    Attributes:
        running_mean: ``[C]``.
        running_var: ``[C]``.
        average_mean: ``[C]`` of earlier batches, or None.
        average_var: Likewise.
        share: The share of that average in what is compared, 0-d on the device; None beside None.
        squared: Squared norms.
    """

    running_mean: Tensor
    running_var: Tensor
    average_mean: Tensor | None
    average_var: Tensor | None
    share: Tensor | None
    squared: bool


def bn_statistics(x: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, mean, var)``; equations: kernels/norm/statistics_loss.py. All differentiable in x."""
    running_mean, running_var, average_mean, average_var, share, squared = target
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


@torch.no_grad()
def bn_statistics_closed(x: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """What the kernel returns: the loss, and ``[4, C]``: mean, var and the gradient's coefficients a, b.

    Several times as fast on a CPU as ``torch.var_mean`` over these dimensions and its backward: reductions run
    along rows of memory.
    """
    running_mean, running_var, average_mean, average_var, share, squared = target
    dtype = compute_dtype(x)
    mean, var = _moments(x.to(dtype))
    k = 0.0 if share is None else share.to(dtype)
    gaps = [running_mean.to(dtype) - mean, running_var.to(dtype) - var]
    if average_mean is not None and average_var is not None:
        gaps[0] = torch.lerp(gaps[0], running_mean.to(dtype) - average_mean.to(dtype), k)
        gaps[1] = torch.lerp(gaps[1], running_var.to(dtype) - average_var.to(dtype), k)
    norms = [torch.linalg.vector_norm(gap) for gap in gaps]
    if squared:
        loss = norms[0].square() + norms[1].square()
        gaps = [2 * gap for gap in gaps]
    else:
        loss = norms[0] + norms[1]
        # Where a norm is 0, so is every gap.
        gaps = [gap / torch.where(norm > 0, norm, 1.0) for gap, norm in zip(gaps, norms, strict=True)]
    count = x.numel() // x.shape[1]
    return loss, torch.stack([mean, var, (k - 1) * gaps[0] / count, 2 * (k - 1) * gaps[1] / count])


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel; two passes, so that nothing cancels."""
    count = x.numel() // x.shape[1]
    if x.dim() > 2 and x.is_contiguous():
        planes = x.flatten(2)
        mean = planes.sum(2).sum(0) / count
        rows = torch.linalg.vector_norm(planes - mean[:, None], dim=2)
        return mean, rows.square().sum(0) / count
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    mean = rows.sum(0) / count
    return mean, (rows - mean).square().sum(0) / count


def bn_statistics_gradient(x: Tensor, stats: Tensor, upstream: Tensor, through: Tensor | None) -> Tensor:
    """upstream·(a + b·(x − mean)) + through, in x's dtype and layout."""
    shape = (-1, *[1] * (x.dim() - 2))
    mean, _, a, b = (row.view(shape) for row in stats)
    grad = (x.to(stats.dtype) - mean).mul_(upstream * b).add_(upstream * a)
    if through is not None:
        grad.add_(through)
    return torch.empty_like(x).copy_(grad) if grad.dtype != x.dtype else grad
