"""Launches of batch norm fused with what follows it; the equations are in the package."""

from __future__ import annotations

from typing import Any

import torch

from ..launch import Launches, Planned, reduction
from ..scratch import scratch
from .bodies import (
    bn_act_backward_kernel,
    bn_act_kernel,
    bn_backward_sums_kernel,
    bn_mse_kernel,
    bn_statistics_kernel,
)
from .plan import ApplyPlan, Matrix, ReducePlan, apply_plan, next_power, reduce_plan

__all__ = ["act", "act_backward", "mse", "statistics"]


def _reduce_constants(m: Matrix, plan: ReducePlan, training: bool) -> dict[str, Any]:
    return {
        "C": m.channels,
        "SPAN": m.span,
        "BC": plan.channels,
        "BM": plan.positions,
        "BP": next_power(plan.parts),
        "WINDOW": plan.window,
        "WIDE": m.wide,
        "TRAINING": training,
        "num_warps": plan.num_warps,
        "enable_fp_fusion": True,
    }


def _apply_constants(m: Matrix, plan: ApplyPlan, training: bool) -> dict[str, Any]:
    return {
        "W": m.width,
        "SPAN": m.span,
        "BR": plan.rows,
        "BW": plan.columns,
        "WIDE": m.wide,
        "TRAINING": training,
        "num_warps": plan.num_warps,
        "enable_fp_fusion": True,
    }


def statistics(
    x: torch.Tensor,
    m: Matrix,
    norm: Any,
    *,
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
    var: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
) -> None:
    """Launch the statistics of ``x`` once.

    Args:
        x: As ``m`` says.
        m: Its matrix.
        norm: Weight, bias, running statistics and the rest, by the names of :class:`torch.nn.BatchNorm2d`; in training
            the running statistics are updated, the count is not (:func:`act` and :func:`mse` do that).
        mean: μ, float32 ``[C]``, written in training.
        rstd: Likewise.
        var: The unbiased variance, float32 ``[C]``, likewise.
        target: t, laid out as x, of the mean squared error whose ``sums`` are wanted.
        sums: Σg and Σg·(x - μ), float32 ``[2, C]``.
    """
    momentum = None if norm.momentum is None else float(norm.momentum)
    tracked = norm.num_batches_tracked
    cumulative = momentum is None and tracked is not None
    geometry = (m, momentum or 0.0, norm.eps, norm.training, cumulative)
    written = (x, target, mean, rstd, var, sums)
    held = (norm.weight, norm.bias, norm.running_mean, norm.running_var, tracked)
    found = _STATISTICS.find(x.device, geometry, (*written, *held))
    found((*written, *held, *_parts(x, m, found.grid, 2 if target is None else 4)))


def _parts(x: torch.Tensor, m: Matrix, grid: tuple[int, ...], each: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for partial sums of a launch over channels, and its counters."""
    return reduction(x.device, each * grid[1] * m.channels, grid[0])[:2]


def _planned_statistics(m: Matrix, momentum: float, eps: float, training: bool, cumulative: bool) -> Planned:
    plan = reduce_plan(m)
    fixed = (m.rows, plan.steps, plan.per, float(m.count), momentum, eps, 2.0 / m.numel)
    constants = _reduce_constants(m, plan, training) | {"CUMULATIVE": cumulative}
    return (-(-m.channels // plan.channels), plan.parts), fixed, constants


_STATISTICS = Launches(bn_statistics_kernel, _planned_statistics)


def act(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    m: Matrix,
    norm: Any,
    centre: tuple[torch.Tensor, torch.Tensor],
    *,
    relu: bool,
    scale: float,
    carry: float,
) -> None:
    """Launch ``y = act(scale·BN(x) + carry·residual)`` once, and count the batch.

    Args:
        x: As ``m`` says.
        residual: Laid out as x, or None.
        y: Written; laid out as x.
        m: The matrix.
        norm: As for :func:`statistics`.
        centre: μ and r of :func:`statistics` in training, else the running mean and variance.
        relu: Whether act is ReLU.
        scale: Of the norm.
        carry: Of the residual.
    """
    tracked = norm.num_batches_tracked if norm.training else None
    geometry = (m, norm.eps, norm.training, relu, scale, carry)
    _ACT(x.device, geometry, (x, residual, y, *centre, norm.weight, norm.bias, tracked))


def _planned_act(m: Matrix, eps: float, training: bool, relu: bool, scale: float, carry: float) -> Planned:
    plan = apply_plan(m)
    constants = _apply_constants(m, plan, training) | {"RELU": relu}
    return (plan.programs,), (m.rows, plan.per, float(scale), float(carry), eps), constants


_ACT = Launches(bn_act_kernel, _planned_act)


def act_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    m: Matrix,
    norm: Any,
    centre: tuple[torch.Tensor, torch.Tensor],
    *,
    grad_x: torch.Tensor | None,
    grad_residual: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    relu: bool,
    scale: float,
    carry: float,
) -> None:
    """Launch the backward of :func:`act`: the sums where they are needed, and what x and the residual get.

    Args:
        grad: Of y, laid out as x.
        x: As it was.
        y: As it was, where ``relu`` and a residual are; else None.
        m: The matrix.
        norm: As it was.
        centre: As it was.
        grad_x: Written where given, laid out as x; the others likewise.
        grad_residual: Of the residual.
        grad_weight: ``[C]``.
        grad_bias: ``[C]``.
        relu: As it was; so are the following.
        scale: Of the norm.
        carry: Of the residual.
    """
    sums, parameters = None, (norm.weight, norm.bias)
    wants_sums = grad_weight is not None or grad_bias is not None
    geometry = (m, norm.eps, norm.training, relu, scale, carry)
    if wants_sums or (grad_x is not None and norm.training):
        sums = scratch(x.device, 2 * m.channels)
        varying = (x, grad, y, *centre, *parameters, sums, grad_weight, grad_bias)
        found = _SUMS.find(x.device, geometry, varying)
        found((*varying, *_parts(x, m, found.grid, 2)))
    if grad_x is None and grad_residual is None:
        return
    _ACT_BACKWARD(x.device, geometry, (x, grad, y, grad_x, grad_residual, *centre, *parameters, sums))


def _planned_sums(m: Matrix, eps: float, training: bool, relu: bool, scale: float, carry: float) -> Planned:
    plan = reduce_plan(m)
    fixed = (m.rows, plan.steps, plan.per, float(scale), eps)
    grid = (-(-m.channels // plan.channels), plan.parts)
    return grid, fixed, _reduce_constants(m, plan, training) | {"RELU": relu}


def _planned_backward(
    m: Matrix, eps: float, training: bool, relu: bool, scale: float, carry: float
) -> Planned:
    plan = apply_plan(m)
    fixed = (m.rows, plan.per, float(scale), float(carry), 1.0 / m.count, eps)
    return (plan.programs,), fixed, _apply_constants(m, plan, training) | {"C": m.channels, "RELU": relu}


_SUMS = Launches(bn_backward_sums_kernel, _planned_sums)
_ACT_BACKWARD = Launches(bn_act_backward_kernel, _planned_backward)


def mse(
    x: torch.Tensor,
    target: torch.Tensor,
    m: Matrix,
    norm: Any,
    centre: tuple[torch.Tensor, torch.Tensor],
    grads: tuple[torch.Tensor | None, ...] = (None, None, None),
    *,
    sums: torch.Tensor | None,
    loss: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
    count: bool = True,
) -> None:
    """Launch the mean squared error of BN(x) against ``target`` once; what is given is written.

    Args:
        x: As ``m`` says.
        target: Laid out as x.
        m: The matrix.
        norm: As for :func:`statistics`.
        centre: As for :func:`act`.
        grads: Of x, laid out as it is, of weight and of bias.
        sums: Of :func:`statistics`, where gradients are wanted.
        loss: 0-d float32.
        upstream: Gradient of the loss, 0-d; None: 1.
        exit_if_one: Do nothing if ``upstream`` is 1: the gradients are there already.
        count: Count the batch in training.
    """
    tracked = norm.num_batches_tracked if norm.training and count else None
    varying = (
        x, target, *grads, upstream, *centre, norm.weight, norm.bias, sums, tracked, loss,
    )  # fmt: skip
    found = _MSE.find(x.device, (m, norm.eps, norm.training, exit_if_one), varying)
    found((*varying, *((None, None) if loss is None else reduction(x.device, found.grid[0])[:2])))


def _planned_mse(m: Matrix, eps: float, training: bool, exit_if_one: bool) -> Planned:
    plan = apply_plan(m)
    fixed = (m.rows, plan.per, 1.0 / m.count, 2.0 / m.numel, eps)
    own = {"C": m.channels, "BP": 1024, "EARLY_EXIT": exit_if_one}
    return (plan.programs,), fixed, _apply_constants(m, plan, training) | own


_MSE = Launches(bn_mse_kernel, _planned_mse)
