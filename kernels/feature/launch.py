"""Launches of the branch recursion and the γ-mix; the equations are in the package."""

from __future__ import annotations

import torch

from ..common.plan import BlockPlan
from ..common.strided import Strides, walk_blocks
from ..launch import MAX_GRID_Y, arrival_counter, device_guard, launch
from .bodies import noise_mix_backward_kernel, noise_mix_kernel, reparam_middle_kernel
from .plan import mix_plan, walked

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
    count, shape = branches.shape[0], tuple(target.shape)
    if target.numel() == 0:
        return
    plan, found, element, run = walked(
        shape,
        (
            branches.stride()[1:],
            target.stride(),
            None if mean is None else mean.stride(),
            None if grad is None else grad.stride()[1:],
            None if grad_mean is None else grad_mean.stride(),
        ),
        noise_scale is not None,
    )
    programs, constants = walk_blocks(plan, recursion_plan(plan.numel, count, branches.itemsize))
    with device_guard(branches):
        launch(
            reparam_middle_kernel,
            (programs,),
            branches,
            target,
            mean,
            grad,
            grad_mean,
            upstream,
            loss,
            None if loss is None else branches.new_empty(programs, dtype=torch.float32),
            None if loss is None else arrival_counter(branches.device),
            u,
            v,
            noise_scale,
            permutation,
            seed,
            plan.numel,
            plan.inner,
            branches.stride(0),
            0 if grad is None else grad.stride(0),
            1.0 / plan.numel,
            M=count,
            S=found[0],
            X0=found[1],
            MEAN=found[2],
            GRAD=found[3],
            GMEAN=found[4],
            E=element,
            HAS_NOISE=noise_scale is not None,
            NOISE_RUN=run,
            SEED_ON_DEVICE=isinstance(seed, torch.Tensor),
            CARRY=carry,
            EARLY_EXIT=exit_if_one,
            **constants,
        )


def _sample_shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape[1:]) or (1,)


def _sample_strides(x: torch.Tensor) -> Strides:
    return x.stride()[1:] or (1,)


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
    plan, (xs, zs), element, run = walked(_sample_shape(x), (_sample_strides(x), _sample_strides(z)), True)
    programs, constants = walk_blocks(plan, mix_plan(plan.numel))
    with device_guard(x):
        launch(
            noise_mix_kernel,
            (programs, min(x.shape[0], MAX_GRID_Y)),
            x,
            gamma,
            z,
            seed,
            x.shape[0],
            plan.numel,
            plan.inner,
            x.stride(0),
            z.stride(0),
            X=xs,
            Z=zs,
            E=element,
            NOISE_RUN=run and plan.numel % 4 == 0,
            SEED_ON_DEVICE=isinstance(seed, torch.Tensor),
            **constants,
        )


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
        _sample_strides(grad_z),
        _sample_strides(x) if want_gamma else None,
        None if grad_x is None else _sample_strides(grad_x),
    )
    plan, (gzs, xs, gxs), element, run = walked(_sample_shape(x), strides, True)
    programs, constants = walk_blocks(plan, mix_plan(plan.numel))
    partial = x.new_empty((x.shape[0], programs), dtype=torch.float32) if want_gamma else None
    with device_guard(x):
        launch(
            noise_mix_backward_kernel,
            (programs, min(x.shape[0], MAX_GRID_Y)),
            grad_z,
            x if want_gamma else None,
            gamma,
            grad_x,
            partial,
            seed,
            x.shape[0],
            plan.numel,
            plan.inner,
            grad_z.stride(0),
            x.stride(0),
            0 if grad_x is None else grad_x.stride(0),
            GZ=gzs,
            X=xs,
            GX=gxs,
            E=element,
            NOISE_RUN=run and plan.numel % 4 == 0,
            SEED_ON_DEVICE=isinstance(seed, torch.Tensor),
            **constants,
        )
    if partial is None:
        return None
    return partial.view(-1) if programs == 1 else partial.sum(1)
