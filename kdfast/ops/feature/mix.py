"""The feature ops: branch recursion and γ-mix; registration, gradients, choice of backend.

Eager calls on the Triton backend take plain ``autograd.Function`` s; torch.compile sees the registered ops,
whose backward is an op too. With create_graph=True the gradients come from the reference, differentiable again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kdfast.backend import resolve
from kdfast.ops.common.counters import fresh_counters
from kdfast.ops.common.gradients import apply, differentiable_gradients
from kdfast.ops.common.layouts import laid_out_as
from kdfast.ops.common.registered import registered_op
from kdfast.ops.feature import native
from kdfast.reference import feature as reference
from kdfast.reference.common import compute_dtype

__all__ = ["noise_mix", "reparam_middle"]

#: More branches than this take the reference; kernels/feature says the same.
MAX_BRANCHES = 64


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels import feature

    return feature


class Recursion(NamedTuple):
    """What the branch recursion is called with beside branches and target; none of it gets a gradient.

    Attributes:
        u: ``[m]``.
        v: ``[m]``.
        permutation: int64 ``[m]``.
        noise_scale: ``[m]`` of the sampled X, or None for the chain.
        seed: Of its noise.
        carry: Whether gradients flow into P_{k−1}.
    """

    u: Tensor
    v: Tensor
    permutation: Tensor
    noise_scale: Tensor | None
    seed: int | Tensor
    carry: bool


def _fused(branches: Tensor, target: Tensor) -> bool:
    return branches.shape[0] <= MAX_BRANCHES and resolve(branches, target) == "triton"


def _for_kernel(call: Recursion) -> Recursion:
    u, v, permutation, noise_scale, seed, carry = call
    for value in (u, v, noise_scale):
        if value is not None and not (value.dtype == torch.float32 and value.is_contiguous()):
            break
    else:
        if permutation.is_contiguous():
            return call
    noise = None if noise_scale is None else noise_scale.to(torch.float32).contiguous()
    u, v = u.to(torch.float32).contiguous(), v.to(torch.float32).contiguous()
    return Recursion(u, v, permutation.contiguous(), noise, seed, carry)


def _launch(by: Any, branches: Tensor, target: Tensor, call: Recursion, **outputs: Any) -> None:
    by.reparam_middle(branches, target, **call._asdict(), **outputs)


@torch.enable_grad()
def _differentiable(
    branches: Tensor, target: Tensor, call: Recursion, grads: tuple[Tensor | None, ...]
) -> Tensor:
    """The branches' gradient, itself differentiable in branches and upstream gradients."""
    outputs = reference.reparam_middle(branches, target, *call)
    wanted = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    outs, ups = zip(*wanted, strict=True)
    (found,) = torch.autograd.grad(outs, (branches,), ups, create_graph=True)
    return found


def _outputs(branches: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=branches.device)
    same = target.dtype == branches.dtype
    return loss, torch.empty_like(target) if same else torch.empty_like(target, dtype=branches.dtype)


class _Reparam(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, branches: Tensor, target: Tensor, call: Recursion, early: bool, by: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(branches, target)
        ctx.call, ctx.by = call, by
        loss, mean = _outputs(branches, target)
        ctx.grad = torch.empty_like(branches) if early else None
        _launch(by, branches, target, call, loss=loss, mean=mean, grad=ctx.grad)
        if early:
            ctx.mark_non_differentiable(mean)
        return loss, mean

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_mean: Tensor | None) -> tuple[Tensor | None, ...]:
        branches, target = ctx.saved_tensors
        if grad_loss is None and grad_mean is None:
            return None, None, None, None, None
        by, given = ctx.by, (grad_loss, grad_mean)
        if torch.is_grad_enabled() or (by is native and not native.have_memory(*given)):
            return _differentiable(branches, target, ctx.call, given), None, None, None, None
        first, ctx.grad = ctx.grad, None
        grad = torch.empty_like(branches) if first is None else first
        upstream = grad.new_zeros((), dtype=torch.float32) if grad_loss is None else grad_loss
        _launch(
            by,
            branches,
            target,
            ctx.call,
            grad=grad,
            grad_mean=grad_mean,
            upstream=upstream,
            exit_if_one=first is not None,
        )
        return grad, None, None, None, None


def reparam_middle(
    branches: Tensor, target: Tensor, call: Recursion, *, mean_needs_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """``(loss, mean S)`` of the branch recursion; arguments are checked by the caller.

    Args:
        branches: S ``[m, …]``.
        target: x0 ``[…]``; gets no gradient.
        call: The rest.
        mean_needs_grad: False: the mean carries no gradient, and the loss's are made in the forward launch.
    """
    if torch.compiler.is_compiling():
        loss, mean = torch.ops.kdfast.reparam_middle(branches, target, *_flat(call))
        return loss, mean if mean_needs_grad else mean.detach()
    by: Any = None
    if _fused(branches, target):
        by = _kernels()
    elif native.fits(branches, target, *call):
        by = native
    else:
        loss, mean = reference.reparam_middle(branches, target, *call)
        return loss, mean if mean_needs_grad else mean.detach()
    call = _for_kernel(call)
    if torch.is_grad_enabled() and branches.requires_grad:
        out = apply(_Reparam, branches, target, call, not mean_needs_grad, by)
        return cast("tuple[Tensor, Tensor]", out)
    loss, mean = _outputs(branches, target)
    _launch(by, branches, target, call, loss=loss, mean=mean)
    return loss, mean


class _NoiseMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, seed: int | Tensor) -> Tensor:
        ctx.save_for_backward(x, gamma)
        ctx.seed = seed
        return _mix(x, gamma, seed)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, gamma = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            out = reference.noise_mix(x, gamma, ctx.seed)
            grads = differentiable_gradients(out, (x, gamma), needs[:2], upstream)
            return grads[0], grads[1], None
        return (*_mix_backward(upstream, x, gamma, ctx.seed, needs[0], needs[1]), None)


def _mix(x: Tensor, gamma: Tensor, seed: int | Tensor) -> Tensor:
    kernels = _kernels()
    z = torch.empty_like(x)
    kernels.noise_mix(x, gamma.contiguous(), z, seed)
    return z


def _mix_backward(
    upstream: Tensor, x: Tensor, gamma: Tensor, seed: int | Tensor, need_x: bool, need_gamma: bool
) -> tuple[Tensor | None, Tensor | None]:
    kernels = _kernels()
    grad_x = torch.empty_like(x) if need_x else None
    grad_gamma = kernels.noise_mix_backward(
        upstream, x, gamma.contiguous(), seed, grad_x=grad_x, want_gamma=need_gamma
    )
    return grad_x, None if grad_gamma is None else grad_gamma.to(gamma.dtype)


def noise_mix(x: Tensor, gamma: Tensor, seed: int | Tensor) -> Tensor:
    """``γ·x + (1 − γ)·ε``, γ ``[B]``; arguments are checked by the caller."""
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.kdfast.noise_mix(x, gamma, *_split(seed))
        return out
    if resolve(x, gamma) == "reference":
        return reference.noise_mix(x, gamma, seed)
    if torch.is_grad_enabled() and (x.requires_grad or gamma.requires_grad):
        return cast(Tensor, apply(_NoiseMix, x, gamma, seed))
    return _mix(x, gamma, seed)


# --- the registered form -------------------------------------------------------------------------------------
# A tensor and an int are different arguments to the schema: a seed travels as (int, Tensor?).


def _split(seed: int | Tensor) -> tuple[int, Tensor | None]:
    return (0, seed) if isinstance(seed, Tensor) else (seed, None)


def _flat(call: Recursion) -> tuple[Any, ...]:
    return (call.u, call.v, call.permutation, call.noise_scale, *_split(call.seed), call.carry)


def _recursion(flat: tuple[Any, ...]) -> Recursion:
    u, v, permutation, noise_scale, seed, seed_tensor, carry = flat
    return Recursion(u, v, permutation, noise_scale, seed if seed_tensor is None else seed_tensor, carry)


_RECURSION = (
    "Tensor branches, Tensor target, Tensor u, Tensor v, Tensor permutation, Tensor? noise_scale, SymInt seed, "
    "Tensor? seed_tensor, bool carry"
)


@registered_op("reparam_middle", f"({_RECURSION}) -> (Tensor, Tensor)")
def _reparam_op(branches: Tensor, target: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    call = _recursion(flat)
    with fresh_counters():
        loss, mean = reparam_middle(branches, target, call)
    return loss, laid_out_as(target, mean, mean.dtype)


@_reparam_op.register_fake
def _(branches: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(branches, target)
    return branches.new_empty((), dtype=dtype), torch.empty_like(target, dtype=branches.dtype)


@registered_op("reparam_middle_backward", f"(Tensor grad_loss, Tensor grad_mean, {_RECURSION}) -> Tensor")
def _reparam_backward_op(
    grad_loss: Tensor, grad_mean: Tensor, branches: Tensor, target: Tensor, *flat: Any
) -> Tensor:
    call = _recursion(flat)
    grad = torch.empty_like(branches)
    if _fused(branches, target):
        _launch(
            _kernels(),
            branches,
            target,
            _for_kernel(call),
            grad=grad,
            grad_mean=grad_mean,
            upstream=grad_loss,
        )
        return grad
    # torch.func differentiates here, below autograd, where torch.autograd does not record.
    vjp = torch.func.vjp(lambda s: reference.reparam_middle(s, target, *call), branches)[1]
    return grad.copy_(vjp((grad_loss, grad_mean))[0])


@_reparam_backward_op.register_fake
def _(grad_loss: Tensor, grad_mean: Tensor, branches: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(branches)


def _reparam_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def _reparam_backward(ctx: Any, grad_loss: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
    inputs = [y if x is None else x for x, y in zip(ctx.saved_tensors, ctx.others, strict=True)]
    grad: Tensor = _reparam_backward_op(grad_loss, grad_mean, *inputs)
    return (grad, *[None] * (len(inputs) - 1))


_reparam_op.register_autograd(_reparam_backward, setup_context=_reparam_context)


@registered_op("noise_mix")
def _mix_op(x: Tensor, gamma: Tensor, seed: int, seed_tensor: Tensor | None) -> Tensor:
    return laid_out_as(x, noise_mix(x, gamma, seed if seed_tensor is None else seed_tensor))


@_mix_op.register_fake
def _(x: Tensor, gamma: Tensor, seed: int, seed_tensor: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@registered_op("noise_mix_backward")
def _mix_backward_op(
    upstream: Tensor, x: Tensor, gamma: Tensor, seed: int, seed_tensor: Tensor | None
) -> tuple[Tensor, Tensor]:
    key = seed if seed_tensor is None else seed_tensor
    if resolve(x, gamma) == "triton":
        grad_x, grad_gamma = _mix_backward(upstream, x, gamma, key, True, True)
        return cast("tuple[Tensor, Tensor]", (grad_x, grad_gamma))
    vjp = torch.func.vjp(lambda a, b: reference.noise_mix(a, b, key), x, gamma)[1]
    found = vjp(upstream)
    return laid_out_as(x, found[0]), laid_out_as(gamma, found[1])


@_mix_backward_op.register_fake
def _(
    upstream: Tensor, x: Tensor, gamma: Tensor, seed: int, seed_tensor: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gamma)


def _mix_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gamma, ctx.seed, seed_tensor = inputs
    ctx.save_for_backward(x, gamma, seed_tensor)


def _mix_autograd(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    x, gamma, seed_tensor = ctx.saved_tensors
    grads: tuple[Tensor, Tensor] = _mix_backward_op(upstream, x, gamma, ctx.seed, seed_tensor)
    return (*grads, None, None)


_mix_op.register_autograd(_mix_autograd, setup_context=_mix_context)
