"""Batch norm of float32 tensors on a CPU, in the loops of csrc/norm_loops.hpp: what launch.py is on the Triton backend.

A channel is read from memory once, where operators read the batch three times and more. Whatever the loops do not
take (other dtypes and layouts, channels of a few values) goes through the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops.common.host import have_memory, runs_here
from kdfast.ops.norm.launch import Act, Error
from kdfast.reference.native import PLAIN, address, extension
from kdfast.reference.norm.fused import BatchNorm

__all__ = ["fits", "have_memory", "launch_act", "launch_act_backward", "launch_mse", "launch_mse_backward"]

#: Values that a channel has side by side: with fewer no vector is filled.
NARROWEST = 16
#: Elements under which an autograd function of Python's costs more than the loops save.
SMALLEST = 1 << 14


def fits(x: Tensor, beside: Tensor | None, norm: BatchNorm) -> bool:
    """Whether the loops take these tensors, which :func:`kdfast.backend.resolve` left to the reference."""
    if x.dim() < 3 or x.numel() < SMALLEST or x.stride(1) < NARROWEST or not runs_here(x):
        return False
    if norm.training and norm.momentum is None:
        return False
    for tensor in (x, beside, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is not None and not (
            tensor.dtype is torch.float32 and tensor.is_contiguous() and type(tensor) in PLAIN
        ):
            return False
    return True


def launch_act(
    x: Tensor, residual: Tensor | None, norm: BatchNorm, act: Act
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """y, x as it was read, and μ with r (or the running statistics)."""
    y, centre = torch.empty_like(x), _centre(x, norm)
    extension().norm_act(
        _call(x, norm, centre, moves=True),
        *act,
        x.data_ptr(),
        address(residual),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    _moved(norm)
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
    grad = grad.contiguous()
    passed = needs[1] and not act.relu and act.carry == 1  # an addition hands its gradient on as it is
    found = [
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(x) if needs[1] and not passed else None,
        *_channel_gradients(norm, needs[2:]),
    ]
    extension().norm_act_backward(
        _call(x, norm, centre),
        *act,
        grad.data_ptr(),
        x.data_ptr(),
        address(y),
        [address(t) for t in found],
        torch.get_num_threads(),
    )
    if passed:
        found[1] = grad
    return tuple(found)


def launch_mse(x: Tensor, target: Tensor, norm: BatchNorm, needs: tuple[bool, ...]) -> Error:
    """The error of a batch norm's output, with the gradients that ``needs`` names."""
    centre = _centre(x, norm)
    grads = (torch.empty_like(x) if needs[0] else None, *_channel_gradients(norm, needs[1:]))
    loss = _mse(x, target, _call(x, norm, centre, moves=True), False, 1.0, grads)
    _moved(norm)
    return Error(torch.tensor(loss, dtype=torch.float32), x, target, centre, None, grads)


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
    """The gradients: those ``first`` made for an upstream gradient of 1, times what it is, or new ones."""
    factor = float(upstream)
    if first is None:
        first = (torch.empty_like(x) if needs[0] else None, *_channel_gradients(norm, needs[1:]))
        _mse(x, target, _call(x, norm, centre), True, factor, first)
    elif factor != 1:
        for grad in first:
            if grad is not None:
                grad.mul_(factor)
    return first


def _mse(
    x: Tensor,
    target: Tensor,
    call: tuple[object, ...],
    known: bool,
    upstream: float,
    grads: tuple[Tensor | None, ...],
) -> float:
    grad_x, grad_weight, grad_bias = grads
    found: float = extension().norm_mse(
        call,
        known,
        x.data_ptr(),
        target.data_ptr(),
        upstream,
        [address(grad_x), 0, address(grad_weight), address(grad_bias)],
        torch.get_num_threads(),
    )
    return found


def _centre(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    if norm.training:
        return x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _call(
    x: Tensor, norm: BatchNorm, centre: tuple[Tensor, Tensor], *, moves: bool = False
) -> tuple[object, ...]:
    """As the loops take a batch norm; running statistics are theirs to change only with ``moves``."""
    running = (norm.running_mean, norm.running_var) if moves else (None, None)
    if not norm.training:
        running = centre  # as they were saved
    return (
        x.shape[0],
        x.shape[1],
        x.stride(1),
        address(norm.weight),
        address(norm.bias),
        address(running[0]),
        address(running[1]),
        address(centre[0]),
        address(centre[1]),
        norm.momentum or 0.0,
        norm.eps,
        norm.training,
    )


def _moved(norm: BatchNorm) -> None:
    """Tell autograd of the statistics that changed, and count the batch."""
    if not norm.training:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    for running in (norm.running_mean, norm.running_var):
        if running is not None:
            torch.autograd.graph.increment_version(running)


def _channel_gradients(norm: BatchNorm, needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = norm.weight, norm.bias
    return (
        torch.empty_like(weight) if needs[0] and weight is not None else None,
        torch.empty_like(bias) if needs[1] and bias is not None else None,
    )
