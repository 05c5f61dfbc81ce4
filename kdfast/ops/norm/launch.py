"""Batch norm on the Triton backend: layouts, memory and launches, for autograd functions and registered ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.reference.norm.fused import BatchNorm

__all__ = ["Act", "Error", "launch_act", "launch_act_backward", "launch_mse", "launch_mse_backward"]


class Act(NamedTuple):
    """``act(scale·BN(x) + carry·residual)``."""

    relu: bool
    scale: float
    carry: float


def _laid_out(x: Tensor, *others: Tensor | None) -> tuple[Any, Tensor, list[Tensor | None]]:
    """x's matrix, x, and the others laid out as x is; what fits already is not copied."""
    from kdfast.kernels import norm as kernels

    found = kernels.matrix(x)
    if found is None:
        x = x.contiguous()
        found = kernels.matrix(x)
    assert found is not None
    return (
        found,
        x,
        [
            t if t is None or _same_layout(t, x) else torch.empty_like(x, dtype=t.dtype).copy_(t)
            for t in others
        ],
    )


def _same_layout(tensor: Tensor, x: Tensor) -> bool:
    return all(
        size == 1 or ours == theirs
        for size, ours, theirs in zip(x.shape, tensor.stride(), x.stride(), strict=True)
    )


def _ready(norm: BatchNorm) -> BatchNorm:
    """Channel values as the kernels read them."""
    weight, bias = (None if t is None else t.contiguous() for t in (norm.weight, norm.bias))
    return norm._replace(weight=weight, bias=bias)


def _running(norm: BatchNorm, launch: Callable[[BatchNorm], None]) -> None:
    """Launch with running statistics that lie densely; those that do not are copied there and back."""
    held = (norm.running_mean, norm.running_var)
    dense = [None if t is None else t.contiguous() for t in held]
    launch(norm._replace(running_mean=dense[0], running_var=dense[1]))
    for mine, used in zip(held, dense, strict=True):
        if norm.training and mine is not None and used is not None and used is not mine:
            mine.copy_(used)


def _centre(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Memory for μ and r in training, else the running mean and variance."""
    if norm.training:
        stats = x.new_empty((2, x.shape[1]), dtype=torch.float32)
        return stats[0], stats[1]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.contiguous(), norm.running_var.contiguous()


def launch_act(
    x: Tensor, residual: Tensor | None, norm: BatchNorm, act: Act, var: Tensor | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """y, x as it was read, and μ with r (or the running statistics)."""
    from kdfast.kernels import norm as kernels

    found, x, (residual,) = _laid_out(x, residual)
    norm, centre = _ready(norm), _centre(x, norm)
    y = torch.empty_like(x, dtype=x.dtype if residual is None else residual.dtype)
    if x.numel() == 0:
        return y, x, centre
    if norm.training:
        _running(norm, lambda n: kernels.statistics(x, found, n, mean=centre[0], rstd=centre[1], var=var))
    kernels.act(x, residual, y, found, norm, centre, **act._asdict())
    return y, x, centre


def launch_act_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    norm: BatchNorm,
    centre: tuple[Tensor, Tensor],
    act: Act,
    needs: tuple[bool, ...],
    residual_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual, weight and bias, None where ``needs`` has no need."""
    from kdfast.kernels import norm as kernels

    found, x, (grad_in, y) = _laid_out(x, grad, y)
    norm = _ready(norm)
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_residual = torch.empty_like(x, dtype=residual_dtype) if needs[1] else None
    grad_weight = torch.empty_like(norm.weight) if needs[2] and norm.weight is not None else None
    grad_bias = torch.empty_like(norm.bias) if needs[3] and norm.bias is not None else None
    passed = needs[1] and not act.relu and act.carry == 1 and grad.dtype == residual_dtype
    if x.numel() == 0:
        return tuple(
            None if g is None else g.zero_() for g in (grad_x, grad_residual, grad_weight, grad_bias)
        )
    kernels.act_backward(
        grad_in,
        x,
        y,
        found,
        norm,
        centre,
        grad_x=grad_x,
        # An addition hands its gradient on as it is.
        grad_residual=None if passed else grad_residual,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        **act._asdict(),
    )
    return grad_x, grad if passed else grad_residual, grad_weight, grad_bias


class Error(NamedTuple):
    """A mean squared error, what it was computed from, and its gradients."""

    loss: Tensor
    x: Tensor
    target: Tensor
    centre: tuple[Tensor, Tensor]
    sums: Tensor | None
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]


def launch_mse(
    x: Tensor, target: Tensor, norm: BatchNorm, needs: tuple[bool, ...], var: Tensor | None = None
) -> Error:
    """The error of a batch norm's output, with the gradients that ``needs`` names."""
    from kdfast.kernels import norm as kernels

    found, x, (aligned,) = _laid_out(x, target)
    assert aligned is not None
    norm, centre = _ready(norm), _centre(x, norm)
    loss = x.new_empty((), dtype=torch.float32)
    wants_sums = needs[1] or needs[2] or (needs[0] and norm.training)
    sums = x.new_empty(2 * x.shape[1], dtype=torch.float32) if wants_sums else None
    if norm.training or wants_sums:
        written = dict(zip(("mean", "rstd"), centre, strict=True)) if norm.training else {}
        _running(
            norm,
            lambda n: kernels.statistics(
                x, found, n, var=var, target=aligned if wants_sums else None, sums=sums, **written
            ),
        )
    grads = _buffers(x, norm, needs)
    kernels.mse(x, aligned, found, norm, centre, sums=sums, loss=loss, **_named(grads))
    return Error(loss, x, aligned, centre, sums, grads)


def _buffers(
    x: Tensor, norm: BatchNorm, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(norm.weight) if needs[1] and norm.weight is not None else None,
        torch.empty_like(norm.bias) if needs[2] and norm.bias is not None else None,
    )


def _named(grads: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    return dict(zip(("grad_x", "grad_weight", "grad_bias"), grads, strict=True))


def launch_mse_backward(
    upstream: Tensor,
    x: Tensor,
    target: Tensor,
    norm: BatchNorm,
    centre: tuple[Tensor, Tensor],
    sums: Tensor | None,
    first: tuple[Tensor | None, ...] | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients: those ``first`` made for an upstream gradient of 1, corrected if it is another, or new ones."""
    from kdfast.kernels import norm as kernels

    found, x, (aligned,) = _laid_out(x, target)
    grads = _buffers(x, norm, needs) if first is None else first
    kernels.mse(
        x,
        aligned,
        found,
        _ready(norm),
        centre,
        sums=sums,
        upstream=upstream,
        exit_if_one=first is not None,
        count=False,
        **_named(grads),
    )
    return grads
