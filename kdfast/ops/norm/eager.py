"""Batch norm with what follows it: registration, gradients, choice of backend.

Eager calls on the Triton backend take plain ``autograd.Function`` s, whose kernels update the running statistics as
well; so do float32 tensors on a CPU, whose loops are C++ (native.py). torch.compile sees the registered ops, which are
pure: they return the batch's statistics, and the update stands in the traced code. With create_graph=True the gradients
come from the reference, differentiable again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from kdfast.backend import resolve
from kdfast.ops.common.gradients import apply, differentiable_gradients
from kdfast.ops.norm import launch, native, registered
from kdfast.ops.norm.launch import Act
from kdfast.reference.norm import fused as reference
from kdfast.reference.norm.fused import BatchNorm

__all__ = ["bn_act", "bn_mse"]


def bn_act(
    x: Tensor,
    residual: Tensor | None,
    norm: BatchNorm,
    *,
    relu: bool,
    scale: float = 1.0,
    carry: float = 1.0,
) -> Tensor:
    """``act(scale·BN(x) + carry·residual)``; arguments are checked by the caller.

    Returns:
        In the residual's dtype (x's without one), laid out as x.
    """
    act = Act(relu, scale, carry)
    if torch.compiler.is_compiling():
        y, stats = registered.bn_act(x, residual, *_flat(norm), *act)
        reference.track(norm, stats[0], stats[2])
        return cast(Tensor, y)
    by: Any = launch
    if resolve(x, residual, norm.weight) == "reference":
        if not native.fits(x, residual, norm):
            return reference.bn_act_tracked(x, residual, norm, *act)
        by = native
    tensors = (x, residual, norm.weight, norm.bias)
    if _recorded(*tensors):
        return cast(Tensor, apply(_Act, *tensors, norm, act, by))
    return cast(Tensor, by.launch_act(x, residual, norm, act)[0])


def bn_mse(x: Tensor, target: Tensor, norm: BatchNorm) -> Tensor:
    """``mean((BN(x) − target)²)``; arguments are checked by the caller."""
    if torch.compiler.is_compiling():
        gradients = _recorded(x, norm.weight, norm.bias)
        loss, stats, *_ = registered.bn_mse(x, target, *_flat(norm), gradients)
        reference.track(norm, stats[0], stats[2])
        return cast(Tensor, loss)
    by: Any = launch
    if resolve(x, target, norm.weight) == "reference":
        if not native.fits(x, target, norm):
            return reference.bn_mse_tracked(x, target, norm)
        by = native
    if _recorded(x, norm.weight, norm.bias):
        return cast(Tensor, apply(_MSE, x, target, norm.weight, norm.bias, norm, by))
    return cast(Tensor, by.launch_mse(x, target, norm, (False, False, False)).loss)


def _flat(norm: BatchNorm) -> tuple[Any, ...]:
    """As the registered ops take it."""
    return (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training, norm.eps)


def _unpacked(norm: BatchNorm, weight: Tensor | None, bias: Tensor | None) -> BatchNorm:
    """With what autograd has saved, which hooks may have packed and unpacked."""
    if norm.weight is weight and norm.bias is bias:
        return norm
    return norm._replace(weight=weight, bias=bias)


def _recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class _Act(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: BatchNorm,
        act: Act,
        by: Any,
    ) -> Tensor:
        made: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] = by.launch_act(x, residual, norm, act)
        y, _, centre = made
        kept = y if act.relu and residual is not None else None
        ctx.save_for_backward(x, residual if kept is not None else None, weight, bias, kept, *centre)
        ctx.called = norm, act, None if residual is None else residual.dtype, by
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias, y, *centre = ctx.saved_tensors
        norm, act, added, by = ctx.called
        norm, needs = _unpacked(norm, weight, bias), ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or (by is native and not native.have_memory(grad)):
            return (*_act_twice(grad, x, residual, norm, act, needs, added), None, None, None)
        grads = by.launch_act_backward(grad, x, y, norm, tuple(centre), act, needs, added or x.dtype)
        return (*grads, None, None, None)


@torch.enable_grad()
def _act_twice(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    norm: BatchNorm,
    act: Act,
    needs: tuple[bool, ...],
    residual_dtype: torch.dtype | None,
) -> list[Tensor | None]:
    """The gradients, differentiable again. Without a ReLU the residual's own value does not matter."""
    if residual is None and residual_dtype is not None:
        residual = torch.zeros_like(x, dtype=residual_dtype).requires_grad_(needs[1])
    out = reference.bn_act(x, residual, norm, *act)[0]
    inputs = cast("list[Tensor]", [x, residual, norm.weight, norm.bias])
    return differentiable_gradients(out, inputs, needs, grad)


class _MSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: BatchNorm,
        by: Any,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        found: launch.Error = by.launch_mse(x, target, norm, (needs[0], needs[2], needs[3]))
        # What was copied to another layout is copied again, if it is ever needed again.
        ctx.save_for_backward(x, target, weight, bias, found.sums, *found.centre)
        ctx.norm, ctx.grads, ctx.by = norm, found.grads, by
        return found.loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, target, weight, bias, sums, *centre = ctx.saved_tensors
        norm = _unpacked(ctx.norm, weight, bias)
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
        by = ctx.by
        if torch.is_grad_enabled() or (by is native and not native.have_memory(upstream)):
            grads = _mse_twice(upstream, x, target, norm, needs)
        else:
            first, ctx.grads = ctx.grads, None
            grads = by.launch_mse_backward(
                upstream, x, target, norm, (centre[0], centre[1]), sums, first, needs
            )
        return grads[0], None, grads[1], grads[2], None, None


@torch.enable_grad()
def _mse_twice(
    upstream: Tensor, x: Tensor, target: Tensor, norm: BatchNorm, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    loss = reference.bn_mse(x, target, norm)[0]
    inputs = cast("list[Tensor]", [x, norm.weight, norm.bias])
    return tuple(differentiable_gradients(loss, inputs, needs, upstream))
