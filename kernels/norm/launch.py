"""Launches of batch norm fused with what follows it; the equations are in the package."""

from __future__ import annotations

from typing import Any

import torch

from ..launch import arrival_counter, device_guard, launch
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
    plan = reduce_plan(m)
    blocks = -(-m.channels // plan.channels)
    partial = x.new_empty((2 if target is None else 4) * plan.parts * m.channels, dtype=torch.float32)
    with device_guard(x):
        launch(
            bn_statistics_kernel,
            (blocks, plan.parts),
            x,
            target,
            mean,
            rstd,
            var,
            sums,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            norm.num_batches_tracked,
            partial,
            arrival_counter(x.device, blocks),
            m.rows,
            plan.steps,
            plan.per,
            float(m.count),
            0.0 if norm.momentum is None else float(norm.momentum),
            norm.eps,
            2.0 / m.numel,
            CUMULATIVE=norm.momentum is None and norm.num_batches_tracked is not None,
            **_reduce_constants(m, plan, norm.training),
        )


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
    plan = apply_plan(m)
    with device_guard(x):
        launch(
            bn_act_kernel,
            (plan.programs,),
            x,
            residual,
            y,
            *centre,
            norm.weight,
            norm.bias,
            norm.num_batches_tracked if norm.training else None,
            m.rows,
            plan.per,
            scale,
            carry,
            norm.eps,
            RELU=relu,
            **_apply_constants(m, plan, norm.training),
        )


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
    sums = None
    wants_sums = grad_weight is not None or grad_bias is not None
    with device_guard(x):
        if wants_sums or (grad_x is not None and norm.training):
            reduce = reduce_plan(m)
            blocks = -(-m.channels // reduce.channels)
            sums = x.new_empty(2 * m.channels, dtype=torch.float32)
            launch(
                bn_backward_sums_kernel,
                (blocks, reduce.parts),
                x,
                grad,
                y,
                *centre,
                norm.weight,
                norm.bias,
                sums,
                grad_weight,
                grad_bias,
                x.new_empty(2 * reduce.parts * m.channels, dtype=torch.float32),
                arrival_counter(x.device, blocks),
                m.rows,
                reduce.steps,
                reduce.per,
                scale,
                norm.eps,
                RELU=relu,
                **_reduce_constants(m, reduce, norm.training),
            )
        if grad_x is None and grad_residual is None:
            return
        plan = apply_plan(m)
        launch(
            bn_act_backward_kernel,
            (plan.programs,),
            x,
            grad,
            y,
            grad_x,
            grad_residual,
            *centre,
            norm.weight,
            norm.bias,
            sums,
            m.rows,
            plan.per,
            scale,
            carry,
            1.0 / m.count,
            norm.eps,
            C=m.channels,
            RELU=relu,
            **_apply_constants(m, plan, norm.training),
        )


def mse(
    x: torch.Tensor,
    target: torch.Tensor,
    m: Matrix,
    norm: Any,
    centre: tuple[torch.Tensor, torch.Tensor],
    *,
    sums: torch.Tensor | None,
    loss: torch.Tensor | None = None,
    grad_x: torch.Tensor | None = None,
    grad_weight: torch.Tensor | None = None,
    grad_bias: torch.Tensor | None = None,
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
        sums: Of :func:`statistics`, where gradients are wanted.
        loss: 0-d float32.
        grad_x: Laid out as x.
        grad_weight: ``[C]``.
        grad_bias: ``[C]``.
        upstream: Gradient of the loss, 0-d; None: 1.
        exit_if_one: Do nothing if ``upstream`` is 1: the gradients are there already.
        count: Count the batch in training.
    """
    plan = apply_plan(m)
    with device_guard(x):
        launch(
            bn_mse_kernel,
            (plan.programs,),
            x,
            target,
            grad_x,
            grad_weight,
            grad_bias,
            upstream,
            *centre,
            norm.weight,
            norm.bias,
            sums,
            norm.num_batches_tracked if norm.training and count else None,
            loss,
            None if loss is None else x.new_empty(plan.programs, dtype=torch.float32),
            None if loss is None else arrival_counter(x.device),
            m.rows,
            plan.per,
            1.0 / m.count,
            2.0 / m.numel,
            norm.eps,
            C=m.channels,
            BP=1024,
            EARLY_EXIT=exit_if_one,
            **_apply_constants(m, plan, norm.training),
        )
