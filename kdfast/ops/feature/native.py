"""The feature ops of float32 tensors on a CPU, in the loops of csrc: what kernels/feature is on the Triton backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops.common.host import have_memory, runs_here
from kdfast.reference.native import PLAIN, address, extension

__all__ = ["fits", "fits_noise", "have_memory", "noise_mse", "reparam_middle"]

#: Elements of all branches under which an autograd function of Python's costs more than the loops save.
SMALLEST = 1 << 10
#: Elements side by side in a row, with fewer of which no vector is filled.
NARROWEST = 16
#: Elements of a prediction under which the same is true of the error in ε.
SMALLEST_PREDICTION = 1 << 14


def fits(branches: Tensor, target: Tensor, *others: object) -> bool:
    """Whether the loops take these tensors, which :func:`kdfast.backend.resolve` left to the reference."""
    for other in others:  # the recursion's, of any dtype and layout, and its numbers
        if isinstance(other, Tensor) and type(other) not in PLAIN:
            return False
    return (
        branches.numel() >= SMALLEST
        and branches.dtype is target.dtype is torch.float32
        and type(target) in PLAIN
        and target.is_contiguous()
        and runs_here(branches)
        and _inner(branches) is not None
    )


def reparam_middle(
    branches: Tensor,
    target: Tensor,
    *,
    loss: Tensor | None = None,
    mean: Tensor | None = None,
    grad: Tensor | None = None,
    grad_mean: Tensor | None = None,
    upstream: Tensor | None = None,
    exit_if_one: bool = False,
    **recursion: Any,
) -> None:
    """As the launcher of that name in kernels/feature, whose ``recursion`` it takes: writes the outputs given."""
    factor = 1.0 if upstream is None else float(upstream)
    if exit_if_one and factor == 1:
        return  # the forward has written it
    inner = _inner(branches)
    assert inner is not None
    shape = [branches.shape[0], target.numel() // inner, inner]
    for tensor in (branches, branches if grad is None else grad):
        shape += [tensor.stride(0), tensor.stride(1) if tensor.dim() > 1 else 0]
    grad_mean = None if grad_mean is None else grad_mean.contiguous()
    found = extension().branch_recursion(
        shape,
        branches.data_ptr(),
        target.data_ptr(),
        *[address(recursion[name]) for name in ("u", "v", "permutation", "noise_scale")],
        int(recursion["seed"]) & 0xFFFFFFFFFFFFFFFF,
        recursion["carry"],
        address(mean),
        address(grad),
        address(grad_mean),
        factor,
        torch.get_num_threads(),
    )
    if loss is not None:
        loss.fill_(found)


def fits_noise(prediction: Tensor, seed: int | Tensor) -> bool:
    """Whether the loop takes the error of this prediction, which is left to the reference."""
    return (
        prediction.numel() >= SMALLEST_PREDICTION
        and prediction.dtype is torch.float32
        and prediction.is_contiguous()
        and runs_here(prediction)
        and (not isinstance(seed, Tensor) or type(seed) in PLAIN)
    )


def noise_mse(
    prediction: Tensor,
    seed: int | Tensor,
    upstream: float | Tensor = 1.0,
    exit_if_one: bool = False,
    **out: Any,
) -> None:
    """As the launcher of that name in kernels/feature: writes ``loss`` and ``grad``, where they are given."""
    factor, loss, grad = float(upstream), out.get("loss"), out.get("grad")
    if exit_if_one:  # the forward has written it
        if factor != 1 and grad is not None:
            grad.mul_(factor)
        return
    key = int(seed) & 0xFFFFFFFFFFFFFFFF
    count, threads = prediction.numel(), torch.get_num_threads()
    found = extension().noise_mse(key, 0, count, prediction.data_ptr(), address(grad), factor, threads)
    if loss is not None:
        loss.fill_(found)


def _inner(branches: Tensor) -> int | None:
    """Elements that lie side by side in a branch: all, or of one of its rows; None: no more than a few."""
    shape, strides = branches.shape, branches.stride()
    dense = 1
    for at in range(len(shape) - 1, 0, -1):
        if shape[at] != 1 and strides[at] != dense:
            return dense if at == 1 and dense >= NARROWEST else None
        dense *= shape[at]
    return dense
