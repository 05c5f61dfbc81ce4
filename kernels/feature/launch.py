"""Launches of the branch recursion and the γ-mix; the equations are in the package."""

from __future__ import annotations

from typing import Any

import torch

from ..common.plan import BlockPlan
from ..common.strided import Strides
from ..launch import MAX_GRID_Y, Launches, Planned, reduction
from ..machine import machine_of
from .bodies import noise_mix_backward_kernel, noise_mix_kernel, reparam_middle_kernel
from .plan import across_plan, mix_plan, noisy_blocks, walked

#: More branches than this take the reference: their residuals no longer fit in registers.
MAX_BRANCHES = 64


def recursion_plan(numel: int, branches: int, itemsize: int) -> BlockPlan:
    """16 bytes a thread while the residuals allow it, chosen by registers and spills of compiled variants.

    Args:
        numel: Elements of one branch.
        branches: m.
        itemsize: Bytes of a branch's element.
    """
    each = 16 // itemsize if branches <= 10 else 4 if branches <= 16 else 2 if branches <= 32 else 1
    warps = 4 if numel >= 1 << 16 else 1
    return BlockPlan(32 * warps * each, warps)


def reparam_middle(
    branches: torch.Tensor,
    target: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    permutation: torch.Tensor,
    *,
    noise_scale: torch.Tensor | None = None,
    seed: int | torch.Tensor = 0,
    carry: bool = True,
    loss: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
    grad_mean: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
) -> None:
    """Launch the branch recursion once; ``loss``, ``mean`` and ``grad`` are written where given.

    Args:
        branches: S ``[m, …]``, any strides; float32, bfloat16 or float16.
        target: x0 ``[…]``, any strides and dtype of those.
        u: float32 ``[m]``, contiguous.
        v: float32 ``[m]``, contiguous.
        permutation: int64 ``[m]``, contiguous: the branch that step k takes.
        noise_scale: w, float32 ``[m]``, contiguous, of the noise after step k (the last is not read).
        seed: Of that noise; an int, or an int64 tensor of one element on the device.
        carry: Whether gradients flow into P_{k-1}.
        loss: 0-d float32.
        mean: Of the target's shape.
        grad: Of the branches' shape.
        grad_mean: Gradient of ``mean``, of the target's shape.
        upstream: Gradient of ``loss``, 0-d; None: 1.
        exit_if_one: Do nothing if ``upstream`` is 1: the gradients are there already.
    """
    if target.numel() == 0:
        return
    told = (noise_scale is not None, isinstance(seed, torch.Tensor), carry, exit_if_one)

    def geometry() -> tuple[Any, ...]:
        operands = (
            branches.stride()[1:],
            target.stride(),
            None if mean is None else mean.stride(),
            None if grad is None else grad.stride()[1:],
            None if grad_mean is None else grad_mean.stride(),
        )
        heads = (branches.stride(0), 0 if grad is None else grad.stride(0))
        capability = machine_of(branches.device).capability
        return (branches.shape[0], tuple(target.shape), operands, heads, branches.itemsize, capability, *told)

    inputs = (branches, target, mean, grad, grad_mean, upstream, loss)
    others = (u, v, noise_scale, permutation, seed)
    found = _RECURSION.find_by(inputs, others, told, geometry)
    memory = (None, None) if loss is None else reduction(branches.device, found.grid[0])[:2]
    found((*inputs, *memory, *others))


def _planned_recursion(
    count: int,
    shape: tuple[int, ...],
    operands: tuple[Strides | None, ...],
    heads: tuple[int, int],
    itemsize: int,
    capability: int,
    noisy: bool,
    seed_on_device: bool,
    carry: bool,
    exit_if_one: bool,
) -> Planned:
    plan, found, element, run = walked(shape, operands, noisy)
    blocks = recursion_plan(plan.numel, count, itemsize)
    programs, constants = noisy_blocks(plan, element, run, blocks, blocks)
    constants |= dict(zip(("S", "X0", "MEAN", "GRAD", "GMEAN"), found, strict=True))
    constants |= {
        "M": count,
        "HAS_NOISE": noisy,
        "SEED_ON_DEVICE": seed_on_device,
        "CARRY": carry,
        "EARLY_EXIT": exit_if_one,
    }
    if constants["TILE"] is not None and itemsize == 4 and capability >= 80:
        # Five programs a multiprocessor; for six, which ptxas of Triton 3.6 aims at, it spills.
        constants["maxnreg"] = 96
    return (programs,), (plan.numel, plan.inner, *heads, 1.0 / plan.numel), constants


_RECURSION = Launches(reparam_middle_kernel, _planned_recursion)


def _sample_shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape[1:]) or (1,)


def noise_mix(x: torch.Tensor, gamma: torch.Tensor, z: torch.Tensor, seed: int | torch.Tensor) -> None:
    """Launch the γ-mix once, into ``z``.

    Args:
        x: ``[B, …]``, any strides; float32, bfloat16 or float16.
        gamma: ``[B]``, contiguous.
        z: Written; of x's shape, any strides.
        seed: Of the noise; an int, or an int64 tensor of one element on the device.
    """
    if x.numel() == 0:
        return
    geometry = (_sample_shape(x), (x.stride(), z.stride()), x.shape[0], isinstance(seed, torch.Tensor))
    _MIX(x.device, geometry, (x, gamma, z, seed))


def _planned_mix(
    shape: tuple[int, ...], strides: tuple[Strides | None, ...], batch: int, seed_on_device: bool, *names: str
) -> Planned:
    """Both kernels of the mix: ``strides`` of what they read and write, with the batch, by the names of these."""
    own = tuple(None if x is None else x[1:] or (1,) for x in strides)
    plan, found, element, run = walked(shape, own, True)
    blocks = mix_plan(plan.numel)
    programs, constants = noisy_blocks(
        plan, element, run and plan.numel % 4 == 0, blocks, across_plan(blocks, plan.numel), plan.numel
    )
    constants |= dict(zip(names or ("X", "Z"), found, strict=True))
    constants |= {"SEED_ON_DEVICE": seed_on_device}
    steps = (0 if x is None else x[0] for x in strides)
    return (programs, min(batch, MAX_GRID_Y)), (batch, plan.numel, plan.inner, *steps), constants


_MIX = Launches(noise_mix_kernel, _planned_mix)


def noise_mix_backward(
    grad_z: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor,
    seed: int | torch.Tensor,
    *,
    grad_x: torch.Tensor | None,
    want_gamma: bool,
) -> torch.Tensor | None:
    """Launch the backward of the γ-mix once: ``grad_x`` is written where given, dγ returned as float32 ``[B]``."""
    if x.numel() == 0:
        return gamma.new_zeros(x.shape[0], dtype=torch.float32) if want_gamma else None
    strides = (
        grad_z.stride(),
        x.stride() if want_gamma else None,
        None if grad_x is None else grad_x.stride(),
    )
    geometry = (_sample_shape(x), strides, x.shape[0], isinstance(seed, torch.Tensor), "GZ", "X", "GX")
    read = x if want_gamma else None
    found = _MIX_BACKWARD.find(x.device, geometry, (grad_z, read, gamma, grad_x, seed))
    programs, partial = found.grid[0], None
    if want_gamma:
        partial = torch.empty((x.shape[0], programs), dtype=torch.float32, device=x.device)
    found((grad_z, read, gamma, grad_x, partial, seed))
    if partial is None:
        return None
    return partial.view(-1) if programs == 1 else partial.sum(1)


_MIX_BACKWARD = Launches(noise_mix_backward_kernel, _planned_mix)
