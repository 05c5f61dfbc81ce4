"""The fused pieces that the method is made of, taking the modules whose names its state dict has.

Everything else of the method (noising, γ-mix, ε-MSE) is :mod:`kdfast.functional`'s as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.functional import bn_ddim_step
from kdfast.functional import bn_mse as _bn_mse
from kdfast.functional import bn_relu as _bn_relu

__all__ = ["bn", "bn_mse", "bn_relu", "bn_step"]


def bn(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None) -> Tensor:
    """Batch norm, plus ``residual``."""
    if _has_its_own(norm):
        out: Tensor = norm(x)
        return out if residual is None else out + residual
    return _bn_relu(x, **_arguments(norm), residual=residual, relu=False)


def bn_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Batch norm and ReLU."""
    if _has_its_own(norm):
        return F.relu(norm(x))
    return _bn_relu(x, **_arguments(norm))


def bn_step(pred: Tensor, norm: nn.BatchNorm2d | None, z: Tensor, c1: float, c2: float) -> Tensor:
    """c1·z + c2·ε̂, with ε̂ = norm(pred)."""
    if norm is None:
        return c1 * z + c2 * pred
    if _has_its_own(norm):
        stepped: Tensor = c1 * z + c2 * norm(pred)
        return stepped
    return bn_ddim_step(z, pred, **_arguments(norm), c1=c1, c2=c2)


def bn_mse(x: Tensor, norm: nn.BatchNorm2d, target: Tensor) -> Tensor:
    """mean((norm(x) − target)²)."""
    if _has_its_own(norm):
        gap = norm(x) - target
        error: Tensor = (gap if gap.dtype == torch.float64 else gap.float()).square().mean()
        return error
    return _bn_mse(x, target, **_arguments(norm))


def _has_its_own(norm: nn.BatchNorm2d) -> bool:
    """Whether it is of another kind, whose forward knows more than its tensors: ``SyncBatchNorm`` of other ranks."""
    return type(norm) is not nn.BatchNorm2d


def _arguments(norm: nn.BatchNorm2d) -> dict[str, Any]:
    """A batch norm's state, as the functions take it."""
    return {
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "weight": norm.weight,
        "bias": norm.bias,
        "training": norm.training,
        "momentum": norm.momentum,
        "eps": norm.eps,
        "num_batches_tracked": norm.num_batches_tracked,
    }
