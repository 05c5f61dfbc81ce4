"""The batch-norm statistics op: registration, gradient, choice of backend.

Eager calls take an ``autograd.Function`` on either backend; torch.compile sees the registered op, whose backward is an
op too. With create_graph=True the gradient comes from the reference, differentiable again.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from kdfast.backend import resolve
from kdfast.ops.common.counters import fresh_counters
from kdfast.ops.common.gradients import apply, differentiable_gradients, is_plain
from kdfast.ops.common.layouts import laid_out_as
from kdfast.ops.common.registered import registered_op
from kdfast.reference.common import compute_dtype
from kdfast.reference.norm import statistics_loss as reference
from kdfast.reference.norm.statistics_loss import Target

__all__ = ["Target", "bn_statistics", "bn_statistics_through"]


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels.norm import statistics_loss

    return statistics_loss


def _dense(x: Tensor) -> Tensor:
    """x itself where its memory is dense with channels second or last, else a copy."""
    if x.is_contiguous():
        return x
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return x
    return x.contiguous()


def _forward(x: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Loss and ``[4, C]`` (mean, var, the gradient's coefficients) of a dense x."""
    if resolve(x) == "reference":
        return reference.bn_statistics_closed(x, target)
    return _launched(x, target)


def _launched(
    x: Tensor, target: Target, mean: Tensor | None = None, var: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same by the kernel; ``mean`` and ``var``, where given, are written as well."""
    tensors = [None if tensor is None else tensor.contiguous() for tensor in target[:5]]
    found = _kernels().bn_statistics(x, *tensors, squared=target.squared, mean=mean, var=var)
    return cast("tuple[Tensor, Tensor]", found)


def _forward_apart(x: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_forward`, and mean and var in memory of their own: what is saved for a backward is nobody's to change."""
    if resolve(x) == "reference":
        loss, stats = reference.bn_statistics_closed(x, target)
        return loss, stats, stats[0].clone(), stats[1].clone()
    mean = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    var = torch.empty_like(mean)
    return *_launched(x, target, mean, var), mean, var


def _backward(x: Tensor, stats: Tensor, upstream: Tensor, through: Tensor | None) -> Tensor:
    if resolve(x) == "reference":
        return reference.bn_statistics_gradient(x, stats, upstream, through)
    kernels = _kernels()
    grad = torch.empty_like(x)
    if through is not None and (through.stride() != x.stride() or through.dtype != x.dtype):
        through = torch.empty_like(x).copy_(through)
    kernels.bn_statistics_backward(x, stats, upstream, through, grad)
    return grad


class _Statistics(torch.autograd.Function):
    """Loss, mean and var; and x again, for who uses it on: then its gradient passes through this one's backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Target, through: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        dense = _dense(x)
        loss, stats, mean, var = _forward_apart(dense, target)
        ctx.save_for_backward(dense, stats)
        ctx.target = target
        ctx.mark_non_differentiable(mean, var)
        return loss, mean, var, x.view_as(x) if through else None

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, _: Any, __: Any, through: Tensor | None
    ) -> tuple[Any, None, None]:
        if upstream is None:
            return through, None, None
        x, stats = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss, *_rest = reference.bn_statistics(x, ctx.target)
            (grad,) = differentiable_gradients(loss, (x,), (True,), upstream)
            return grad if through is None or grad is None else grad + through, None, None
        return _backward(x, stats, upstream, through), None, None


def bn_statistics(x: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, mean, var)`` of ``[N, C, …]`` with elements; mean and var carry no gradient. Checked by the caller."""
    return _statistics(x, target, through=False)[:3]


def bn_statistics_through(x: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss, mean, var, x)``: whatever follows takes this x, so that both gradients of it are one launch's."""
    return _statistics(x, target, through=True)


def _statistics(x: Tensor, target: Target, *, through: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if torch.compiler.is_compiling():
        loss, stats = torch.ops.kdfast.bn_statistics(x, *target)
        return loss, stats[0].detach(), stats[1].detach(), x
    if not is_plain(x, x):
        loss, mean, var = reference.bn_statistics(x, target)
        return loss, mean.detach(), var.detach(), x
    if torch.is_grad_enabled() and x.requires_grad:
        return cast("tuple[Tensor, Tensor, Tensor, Tensor]", apply(_Statistics, x, target, through))
    loss, stats = _forward(_dense(x), target)
    return loss, stats[0], stats[1], x


# --- the registered form -------------------------------------------------------------------------------------
# It returns [4, C] as the kernel does: mean, var, and the gradient's coefficients.


_SCHEMA = (
    "(Tensor x, Tensor running_mean, Tensor running_var, Tensor? average_mean, Tensor? average_var, Tensor? share, "
    "bool squared) -> (Tensor, Tensor)"
)


@registered_op("bn_statistics", _SCHEMA)
def _op(x: Tensor, *target: Any) -> tuple[Tensor, Tensor]:
    with fresh_counters():
        return _forward(_dense(x), Target(*target))


@_op.register_fake
def _(x: Tensor, *target: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    return x.new_empty((), dtype=dtype), x.new_empty((4, x.shape[1]), dtype=dtype)


@registered_op("bn_statistics_backward")
def _backward_op(upstream: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    return laid_out_as(x, _backward(_dense(x), stats, upstream, None))


@_backward_op.register_fake
def _(upstream: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    return torch.empty_like(x)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    x, stats = ctx.saved_tensors
    grad = None if upstream is None else cast(Tensor, _backward_op(upstream, x, stats))
    return (grad, *[None] * 6)


_op.register_autograd(_autograd, setup_context=_context)
