"""What torch.compile sees of the batch-norm ops: pure functions, the running statistics left to the caller.

An output that is not wanted is an empty tensor, since a schema's results are never None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kdfast.backend import resolve
from kdfast.ops.common.counters import fresh_counters
from kdfast.ops.common.layouts import laid_out_as
from kdfast.ops.common.registered import registered_op
from kdfast.ops.norm import launch as ops
from kdfast.reference.common import compute_dtype
from kdfast.reference.norm import fused as reference
from kdfast.reference.norm.fused import BatchNorm

__all__ = ["bn_act", "bn_mse"]


#: What both ops know of the norm, and what each of them is told beside it.
_NORM = "Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, float eps"
_ACT = f"{_NORM}, bool relu, float scale, float carry"
_ACT_SCHEMA = f"(Tensor x, Tensor? residual, {_ACT}) -> (Tensor, Tensor)"
_ACT_BACKWARD_SCHEMA = (
    f"(Tensor grad, Tensor x, Tensor? residual, Tensor y, Tensor stats, {_ACT}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_MSE_SCHEMA = f"(Tensor x, Tensor target, {_NORM}, bool gradients) -> (Tensor, Tensor, Tensor)"
_MSE_BACKWARD_SCHEMA = (
    f"(Tensor upstream, Tensor x, Tensor target, Tensor stats, Tensor sums, {_NORM}) "
    "-> (Tensor, Tensor, Tensor)"
)


def _norm(flat: Sequence[Any]) -> BatchNorm:
    weight, bias, mean, var, training, eps = flat
    # In training the running statistics take no part here: the caller moves them.
    held: tuple[Tensor | None, Tensor | None] = (None, None) if training else (mean, var)
    return BatchNorm(weight, bias, *held, None, training, 0.0, eps)


def _act(flat: Sequence[Any]) -> tuple[BatchNorm, ops.Act]:
    return _norm(flat[:6]), ops.Act(*flat[6:])


def _stats(x: Tensor, *others: Tensor) -> Tensor:
    """Memory for μ, r and the unbiased variance."""
    return x.new_zeros((3, x.shape[1]), dtype=compute_dtype(x, *others))


def _sums(x: Tensor, target: Tensor, wanted: bool) -> Tensor:
    """Memory for Σg and Σg·(x - μ), which only the kernels make."""
    return x.new_zeros(2 * x.shape[1] if wanted else 0, dtype=compute_dtype(x, target))


def _fill(stats: Tensor, x: Tensor, norm: BatchNorm, mean: Tensor, var: Tensor) -> None:
    count = x.numel() // x.shape[1]
    biased = var * ((count - 1) / count) if norm.training else var
    stats[0], stats[1], stats[2] = mean, (biased + norm.eps).rsqrt(), var


def _put(
    value: Tensor | None, like: Tensor, dtype: torch.dtype | None = None, given: Tensor | None = None
) -> Tensor:
    """``value`` as its fake said: of ``like``'s layout, and not ``given``, which is an input."""
    if value is None:
        return like.new_empty(0)
    return laid_out_as(like, value.clone() if value is given else value, dtype)


@registered_op("bn_act", _ACT_SCHEMA)
def bn_act(x: Tensor, residual: Tensor | None, *flat: Any) -> tuple[Tensor, Tensor]:
    """y and ``[3, C]``: μ, r and the unbiased variance."""
    norm, act = _act(flat)
    stats = _stats(x)
    if resolve(x, residual, norm.weight) == "reference":
        y, mean, var = reference.bn_act(x, residual, norm, *act)
        _fill(stats, x, norm, mean, var)
    else:
        with fresh_counters():
            y, _, centre = ops.launch_act(x, residual, norm, act, stats[2])
        if norm.training:
            stats[0], stats[1] = centre
        else:
            _fill(stats, x, norm, *centre)
    return _put(y, x, x.dtype if residual is None else residual.dtype), stats


@bn_act.register_fake
def _(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if residual is None else residual.dtype
    return torch.empty_like(x, dtype=dtype), _stats(x)


@registered_op("bn_act_backward", _ACT_BACKWARD_SCHEMA)
def bn_act_backward(
    grad: Tensor, x: Tensor, residual: Tensor | None, y: Tensor, stats: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    """Gradients of x, residual, weight and bias."""
    norm, act = _act(flat)
    found: tuple[Tensor | None, ...]
    if resolve(x, residual, norm.weight) == "reference":
        g = grad.to(stats.dtype)
        g = torch.where(y > 0, g, 0.0) if act.relu else g
        grad_x, grad_weight, grad_bias = reference.bn_backward(act.scale * g, x, norm, stats[0], stats[1])
        found = (grad_x, None if residual is None else act.carry * g, grad_weight, grad_bias)
    else:
        centre = (stats[0], stats[1]) if norm.training else (norm.running_mean, norm.running_var)
        needs = (True, residual is not None, norm.weight is not None, norm.bias is not None)
        with fresh_counters():
            found = ops.launch_act_backward(
                grad,
                x,
                y if act.relu and residual is not None else None,
                norm,
                cast("tuple[Tensor, Tensor]", centre),
                act,
                needs,
                x.dtype if residual is None else residual.dtype,
            )
    likes = (x, residual, norm.weight, norm.bias)
    return tuple(
        x.new_empty(0) if like is None else _put(g, like, given=grad)
        for g, like in zip(found, likes, strict=True)
    )


@bn_act_backward.register_fake
def _(
    grad: Tensor, x: Tensor, residual: Tensor | None, y: Tensor, stats: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in (x, residual, *flat[:2]))


def _act_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, running_mean, running_var, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    # In training they are about to be changed, and not needed.
    running = (None, None) if ctx.options[0] else (running_mean, running_var)
    ctx.save_for_backward(x, residual, *output, weight, bias, *running)


def _act_autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = bn_act_backward(grad, *saved, *ctx.options)
    inputs = (saved[0], saved[1], saved[4], saved[5])
    found = [None if t is None else g for t, g in zip(inputs, grads, strict=True)]
    return (*found, *[None] * 7)


bn_act.register_autograd(_act_autograd, setup_context=_act_context)


@registered_op("bn_mse", _MSE_SCHEMA)
def bn_mse(x: Tensor, target: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    """The loss, the statistics as of :func:`bn_act`, and with ``gradients`` the sums that those are made of."""
    *held, gradients = flat
    norm = _norm(held)
    stats, sums = _stats(x, target), _sums(x, target, gradients)
    if resolve(x, target, norm.weight) == "reference":
        loss, mean, var = reference.bn_mse(x, target, norm)
        _fill(stats, x, norm, mean, var)
        return loss, stats, sums
    # In evaluation x alone needs no sums, but who will ask for a gradient is not known here.
    with fresh_counters():
        made = ops.launch_mse(x, target, norm, (False, gradients, gradients), stats[2])
    if norm.training:
        stats[0], stats[1] = made.centre
    return made.loss, stats, sums if made.sums is None else made.sums


@bn_mse.register_fake
def _(x: Tensor, target: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    loss = x.new_empty((), dtype=compute_dtype(x, target))
    return loss, _stats(x, target), _sums(x, target, flat[-1])


@registered_op("bn_mse_backward", _MSE_BACKWARD_SCHEMA)
def bn_mse_backward(
    upstream: Tensor, x: Tensor, target: Tensor, stats: Tensor, sums: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and bias, computed afresh: those of a forward would be rounded before the loss's scale."""
    norm, likes = _norm(flat), (x, *flat[:2])
    found: tuple[Tensor | None, ...]
    if resolve(x, target, norm.weight) == "reference":
        if norm.training:
            mean, rstd = stats[0], stats[1]
        else:
            mean, rstd = flat[2].to(stats.dtype), (flat[3].to(stats.dtype) + norm.eps).rsqrt()
        out = reference.normalise(x, norm)[0].to(stats.dtype)
        error = (out - target.to(stats.dtype)) * (upstream * (2 / x.numel()))
        found = reference.bn_backward(error, x, norm, mean, rstd)
    else:
        centre = (stats[0], stats[1]) if norm.training else (norm.running_mean, norm.running_var)
        needs = (True, norm.weight is not None, norm.bias is not None)
        found = ops.launch_mse_backward(
            upstream, x, target, norm, cast("tuple[Tensor, Tensor]", centre), sums, None, needs
        )
    return tuple(
        x.new_empty(0) if like is None else _put(g, like) for g, like in zip(found, likes, strict=True)
    )


@bn_mse_backward.register_fake
def _(
    upstream: Tensor, x: Tensor, target: Tensor, stats: Tensor, sums: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in (x, *flat[:2]))


def _mse_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, target, weight, bias, running_mean, running_var, *ctx.options = inputs[:-1]
    ctx.mark_non_differentiable(*output[1:])
    # In training they are about to be changed, and not needed.
    running = (None, None) if ctx.options[0] else (running_mean, running_var)
    ctx.save_for_backward(x, target, *output[1:], weight, bias, *running)


def _mse_autograd(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = bn_mse_backward(upstream, *saved, *ctx.options)
    inputs = (saved[0], saved[4], saved[5])
    grad_x, grad_weight, grad_bias = (None if t is None else g for t, g in zip(inputs, grads, strict=True))
    return (grad_x, None, grad_weight, grad_bias, *[None] * 5)


bn_mse.register_autograd(_mse_autograd, setup_context=_mse_context)
