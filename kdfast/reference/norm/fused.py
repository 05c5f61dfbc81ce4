"""Batch norm and what rides on it, in plain PyTorch: the oracle of the tests and the path for CPU and float64.

The equations are those of kernels/norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.reference.common import compute_dtype

__all__ = [
    "BatchNorm",
    "bn_act",
    "bn_act_tracked",
    "bn_backward",
    "bn_mse",
    "bn_mse_tracked",
    "normalise",
    "normalise_and_track",
    "track",
]


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


def normalise_and_track(x: Tensor, norm: BatchNorm) -> Tensor:
    """BN(x) as :func:`normalise` has it; running statistics are moved in the same pass wherever torch can do so."""
    kept = (norm.running_mean, norm.running_var)
    held = [t for t in (*kept, norm.weight, norm.bias) if t is not None]
    together = (kept[0] is None) == (kept[1] is None) and all(t.dtype == x.dtype for t in held)
    if norm.training and norm.momentum is not None and x.dtype == compute_dtype(x) and together:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        return F.batch_norm(x, *kept, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    out, mean, var = normalise(x, norm)
    track(norm, mean, var)
    return out


def bn_act(
    x: Tensor, residual: Tensor | None, norm: BatchNorm, relu: bool, scale: float, carry: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(act(scale·BN(x) + carry·residual), mean, unbiased variance)``.

    The first in the residual's dtype (x's without one).
    """
    out, mean, var = normalise(x, norm)
    return _act(out, x, residual, relu, scale, carry), mean, var


def bn_act_tracked(
    x: Tensor, residual: Tensor | None, norm: BatchNorm, relu: bool, scale: float, carry: float
) -> Tensor:
    """The first of :func:`bn_act`; moves the running statistics."""
    return _act(normalise_and_track(x, norm), x, residual, relu, scale, carry)


def _act(out: Tensor, x: Tensor, residual: Tensor | None, relu: bool, scale: float, carry: float) -> Tensor:
    """``out`` is nobody else's and is written over: on a CPU fresh memory costs more than the arithmetic."""
    if residual is not None:
        beside = residual.to(out.dtype)
        if torch._C._are_functorch_transforms_active():  # where one of the two may have a dimension more
            out = scale * out + carry * beside
        else:
            out = (out if scale == 1 else out.mul_(scale)).add_(beside, alpha=carry)
    elif scale != 1:
        out = out.mul_(scale)
    if relu:
        out = out.relu_()
    return out.to(x.dtype if residual is None else residual.dtype)


def bn_mse(x: Tensor, target: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """``(mean((BN(x) − target)²), mean, unbiased variance)``, the first in float32 (float64)."""
    out, mean, var = normalise(x, norm)
    return _mse(out, x, target), mean, var


def bn_mse_tracked(x: Tensor, target: Tensor, norm: BatchNorm) -> Tensor:
    """The first of :func:`bn_mse`; moves the running statistics."""
    return _mse(normalise_and_track(x, norm), x, target)


def _mse(out: Tensor, x: Tensor, target: Tensor) -> Tensor:
    dtype = compute_dtype(x, target)
    return F.mse_loss(out.to(dtype), target.to(dtype))


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
