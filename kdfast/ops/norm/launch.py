"""Batch norm on the Triton backend: layouts, memory and launches, for autograd functions and registered ops."""

from __future__ import annotations

import functools
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


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels import norm

    return norm


def _laid_out(x: Tensor, *others: Tensor | None) -> tuple[Any, Tensor, tuple[Tensor | None, ...]]:
    """x's matrix, x, and the others laid out as x is; what fits already is not copied."""
    kernels = _kernels()
    found = kernels.matrix(x)
    if found is None:
        x = x.contiguous()
        found = kernels.matrix(x)
    assert found is not None
    strides = x.stride()
    for t in others:
        if t is not None and t.stride() != strides:
            return found, x, tuple([_as_laid_out(t, x) for t in others])
    return found, x, others


def _as_laid_out(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    if tensor is None or _same_layout(tensor, x):
        return tensor
    return torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)


def _same_layout(tensor: Tensor, x: Tensor) -> bool:
    return all(
        size == 1 or ours == theirs
        for size, ours, theirs in zip(x.shape, tensor.stride(), x.stride(), strict=True)
    )


def _ready(norm: BatchNorm) -> BatchNorm:
    """Channel values as the kernels read them."""
    weight, bias = norm.weight, norm.bias
    if (weight is None or weight.is_contiguous()) and (bias is None or bias.is_contiguous()):
        return norm
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    return norm._replace(weight=weight, bias=bias)


def _dense(norm: BatchNorm) -> BatchNorm:
    """With running statistics that lie densely, as the kernels read and write them: itself where they do."""
    held = mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None or (mean.is_contiguous() and var.is_contiguous()):
        return norm
    mean, var = (t.contiguous() for t in held if t is not None)
    return norm._replace(running_mean=mean, running_var=var)


def _put_back(norm: BatchNorm, used: BatchNorm) -> None:
    """Copy the statistics that were updated in :func:`_dense` memory to where they belong."""
    if used is norm or not norm.training:
        return
    pairs = (norm.running_mean, used.running_mean), (norm.running_var, used.running_var)
    for mine, theirs in pairs:
        if mine is not None and theirs is not None and theirs is not mine:
            mine.copy_(theirs)


def _centre(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Memory for μ and r in training, else the running mean and variance."""
    if norm.training:
        held = norm.running_mean
        if type(held) is torch.Tensor and held.dtype is torch.float32 and held.is_contiguous():
            mean = torch.empty_like(held)  # memory like other memory is made soonest
        else:
            mean = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
        return mean, torch.empty_like(mean)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.contiguous(), norm.running_var.contiguous()


def launch_act(
    x: Tensor, residual: Tensor | None, norm: BatchNorm, act: Act, var: Tensor | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """y, x as it was read, and μ with r (or the running statistics)."""
    kernels = _kernels()
    found, x, (residual,) = _laid_out(x, residual)
    norm, centre = _ready(norm), _centre(x, norm)
    alike = residual is None or residual.dtype == x.dtype
    y = torch.empty_like(x) if alike or residual is None else torch.empty_like(x, dtype=residual.dtype)
    if x.numel() == 0:
        return y, x, centre
    if norm.training:
        used = _dense(norm)
        kernels.statistics(x, found, used, mean=centre[0], rstd=centre[1], var=var)
        _put_back(norm, used)
    kernels.act(x, residual, y, found, norm, centre, relu=act.relu, scale=act.scale, carry=act.carry)
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
    kernels = _kernels()
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
        relu=act.relu,
        scale=act.scale,
        carry=act.carry,
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
    kernels = _kernels()
    found, x, (aligned,) = _laid_out(x, target)
    assert aligned is not None
    norm, centre = _ready(norm), _centre(x, norm)
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    wants_sums = needs[1] or needs[2] or (needs[0] and norm.training)
    sums = torch.empty(2 * x.shape[1], dtype=torch.float32, device=x.device) if wants_sums else None
    if norm.training or wants_sums:
        mean, rstd = centre if norm.training else (None, None)
        used, compared = _dense(norm), aligned if wants_sums else None
        kernels.statistics(x, found, used, mean=mean, rstd=rstd, var=var, target=compared, sums=sums)
        _put_back(norm, used)
    grads = _buffers(x, norm, needs)
    kernels.mse(x, aligned, found, norm, centre, grads, sums=sums, loss=loss)
    return Error(loss, x, aligned, centre, sums, grads)


def _buffers(
    x: Tensor, norm: BatchNorm, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(norm.weight) if needs[1] and norm.weight is not None else None,
        torch.empty_like(norm.bias) if needs[2] and norm.bias is not None else None,
    )


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
    kernels = _kernels()
    found, x, (aligned,) = _laid_out(x, target)
    grads = _buffers(x, norm, needs) if first is None else first
    kernels.mse(
        x,
        aligned,
        found,
        _ready(norm),
        centre,
        grads,
        sums=sums,
        upstream=upstream,
        exit_if_one=first is not None,
        count=False,
    )
    return grads
