"""Batch norm and what rides on it, in plain PyTorch: the oracle of the tests and the path for CPU and float64.

The equations are those of kernels/norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.reference.common import compute_dtype

__all__ = ["BatchNorm", "bn_act", "bn_backward", "bn_mse", "normalise", "track"]


class BatchNorm(NamedTuple):
    """What ``nn.BatchNorm2d`` holds.

    Attributes:
        weight: γ ``[C]``, or None for 1.
        bias: β ``[C]``, or None for 0.
        running_mean: ``[C]``, updated in place in training; None keeps none.
        running_var: ``[C]``, likewise, of the unbiased variance.
        num_batches_tracked: int64 of one element, counted up in training, or None.
        training: Normalise by the batch's statistics rather than by the running ones.
        momentum: Share of the new value in the running ones; None: their cumulative average.
        eps: Added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    training: bool
    momentum: float | None
    eps: float


def normalise(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """``(BN(x), mean, unbiased variance)`` in float32 (float64); the latter two of the batch when training.

    Running statistics are left alone: see :func:`track`.
    """
    dtype = compute_dtype(x)
    weight, bias = (None if t is None else t.to(dtype) for t in (norm.weight, norm.bias))
    if not norm.training:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
        return F.batch_norm(x.to(dtype), mean, var, weight, bias, False, 0.0, norm.eps), mean, var
    mean, var = (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    # A momentum of 1 hands the batch's own statistics out.
    return F.batch_norm(x.to(dtype), mean, var, weight, bias, True, 1.0, norm.eps), mean, var


@torch.no_grad()
def track(norm: BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Move the running statistics towards a training batch's, as ``nn.BatchNorm2d`` does, without a sync."""
    if not norm.training:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
        if running is None:
            continue
        if norm.momentum is not None:
            running.mul_(1 - norm.momentum).add_(new.to(running.dtype), alpha=norm.momentum)
        else:
            assert norm.num_batches_tracked is not None
            running.add_((new.to(running.dtype) - running) / norm.num_batches_tracked)


def bn_act(
    x: Tensor, residual: Tensor | None, norm: BatchNorm, relu: bool, scale: float, carry: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(act(scale·BN(x) + carry·residual), mean, unbiased variance)``.

    The first in the residual's dtype (x's without one).
    """
    out, mean, var = normalise(x, norm)
    if scale != 1:
        out = scale * out
    if residual is not None:
        out = out + (residual.to(out.dtype) if carry == 1 else carry * residual.to(out.dtype))
    if relu:
        out = out.relu()
    return out.to(x.dtype if residual is None else residual.dtype), mean, var


def bn_mse(x: Tensor, target: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """``(mean((BN(x) − target)²), mean, unbiased variance)``, the first in float32 (float64)."""
    out, mean, var = normalise(x, norm)
    dtype = compute_dtype(x, target)
    return F.mse_loss(out.to(dtype), target.to(dtype)), mean, var


def bn_backward(
    grad: Tensor, x: Tensor, norm: BatchNorm, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from that of BN(x), written out; for code below autograd.

    Args:
        grad: Of BN(x), in the dtype to compute in.
        x: As it was.
        norm: As it was.
        mean: μ, the batch's or the running one.
        rstd: 1/√(σ² + eps).
    """
    channel = (1, -1, *[1] * (x.dim() - 2))
    others = [0, *range(2, x.dim())]
    centred = x.to(grad.dtype) - mean.view(channel)
    sum_g, sum_gx = grad.sum(others), (grad * centred).sum(others)
    gain = rstd if norm.weight is None else norm.weight.to(grad.dtype) * rstd
    grad_x = grad
    if norm.training:
        count = x.numel() // x.shape[1]
        slope = rstd.square() * sum_gx / count
        grad_x = grad - (sum_g / count).view(channel) - centred * slope.view(channel)
    return grad_x * gain.view(channel), sum_gx * rstd, sum_g
