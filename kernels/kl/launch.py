"""Launch of the KL kernels: outputs, strides and arguments; the equation and the plans are in the package."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from ..common.scale import Scale, in_units, value_and_pointer
from ..launch import RowLayout, arrival_counter, as_rows, device_guard, launch
from ..machine import machine_of
from . import chunks as _kl_chunks
from . import classes as _kl_classes
from . import rows as _kl_rows
from . import split as _kl_split
from . import two_pass as _kl_two_pass
from .plan import CLASS_PIXEL, KLPlan, kl_plan


class Labels(NamedTuple):
    """Hard labels on the same pass (labels.py).

    ``label`` is int64, one a row; ``factor`` its float32 factor in the loss, 0 where it is ignored. ``second``
    and ``second_factor`` are the same for the other label of a mixed sample, or None. All contiguous.
    """

    label: torch.Tensor
    factor: torch.Tensor
    second: torch.Tensor | None
    second_factor: torch.Tensor | None
    smoothing: float


class Statistics(NamedTuple):
    """Written a row, when given: the teacher's class (int64), its probability at T = 1 (float32), agreement (bool)."""

    teacher_class: torch.Tensor
    teacher_prob: torch.Tensor
    agreement: torch.Tensor


def kd_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    dim: int,
    scale: Scale,
    *,
    reduce: bool,
    want_rows: bool = True,
    grad_student: torch.Tensor | None = None,
    grad_teacher: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
    labels: Labels | None = None,
    statistics: Statistics | None = None,
) -> torch.Tensor:
    """Launch the KL kernel once.

    Args:
        student: Logits, any strides; bfloat16, float16 or float32.
        teacher: Logits of the same shape, its own strides and dtype.
        dim: Class dimension, non-negative.
        scale: The row factors.
        reduce: Also sum the rows, in this launch and in a fixed order.
        want_rows: Store the rows (implied when not ``reduce``).
        grad_student: Written with the gradient, when given; its own strides.
        grad_teacher: The same for the teacher.
        upstream: Multiplies loss and gradients: one value, or contiguous, one a row.
        exit_if_one: Do nothing if the single upstream value is 1: the gradients are there already.
        labels: Add the cross-entropy with these labels.
        statistics: Also written.

    Returns:
        The 0-d loss when ``reduce``, else one float32 value a row.
    """
    shape = student.shape[:dim] + student.shape[dim + 1 :]
    num_rows, num_classes = shape.numel(), student.shape[dim]
    rows = student.new_empty(shape, dtype=torch.float32) if want_rows or not reduce else None
    loss = student.new_empty((), dtype=torch.float32) if reduce else None
    if num_rows == 0 or num_classes == 0:
        return loss.zero_() if loss is not None else rows.zero_()

    tensors = [x for x in (student, teacher, grad_student, grad_teacher) if x is not None]
    layout = as_rows(tensors, dim)
    if layout is None:  # more than two groups of strides: the one case that is copied
        grads = [
            None if g is None else g.clone(memory_format=torch.contiguous_format)
            for g in (grad_student, grad_teacher)
        ]
        result = kd_kl(
            student.contiguous(),
            teacher.contiguous(),
            dim,
            scale,
            reduce=reduce,
            want_rows=want_rows,
            grad_student=grads[0],
            grad_teacher=grads[1],
            upstream=upstream,
            exit_if_one=exit_if_one,
            labels=labels,
            statistics=statistics,
        )
        for grad, computed in zip((grad_student, grad_teacher), grads):
            if grad is not None:
                grad.copy_(computed)
        return result
    strides = iter(layout.strides)
    s_strides, t_strides = next(strides), next(strides)
    gs_strides = next(strides) if grad_student is not None else (0, 0, 0)
    gt_strides = next(strides) if grad_teacher is not None else (0, 0, 0)

    plain = labels is None and statistics is None
    plan = _plan(student, teacher, grad_student, grad_teacher, layout, num_classes, plain)
    # A cluster's programs would each count themselves, so its rows are summed by a launch of their own.
    in_launch = reduce and plan.regime != "cluster"
    if reduce and not in_launch and rows is None:
        rows = student.new_empty(shape, dtype=torch.float32)
    if plan.layout == CLASS_PIXEL:
        grid = (layout.outer * triton.cdiv(layout.inner, plan.rows),)
    else:
        grid = (triton.cdiv(num_rows, plan.rows) * plan.splits,)
    partial = student.new_empty(grid, dtype=torch.float32) if in_launch else None
    counter = arrival_counter(student.device) if in_launch else None
    unit = math.gcd(16, *(stride[0] for stride in (s_strides, t_strides, gs_strides, gt_strides)))
    kernel, tile = _kernel(plan, layout, num_classes)
    if labels is not None:
        tile |= _label_arguments(labels)
    if statistics is not None:
        tile |= _statistics_arguments(statistics)
    with device_guard(student):
        if plan.regime == "split":
            tile["sums_ptr"] = student.new_empty((grid[0], 5), dtype=torch.float32)
            launch(
                _kl_split.kd_kl_split_sums_kernel,
                grid,
                student,
                teacher,
                tile["sums_ptr"],
                upstream,
                *value_and_pointer(scale.temperature),
                layout.inner,
                *in_units(s_strides, unit),
                *in_units(t_strides, unit),
                V=num_classes,
                UNIT=unit,
                BLOCK=plan.chunks,
                SPLITS=plan.splits,
                PART=tile["PART"],
                T_PTR=isinstance(scale.temperature, torch.Tensor),
                EARLY_EXIT=exit_if_one,
                num_warps=plan.num_warps,
                enable_fp_fusion=True,
            )
        launch(
            kernel,
            grid,
            student,
            teacher,
            grad_student,
            grad_teacher,
            rows,
            loss,
            partial,
            counter,
            scale.weight,
            scale.mask,
            upstream,
            *value_and_pointer(scale.temperature),
            *value_and_pointer(scale.divisor),
            num_rows,
            layout.inner,
            *in_units(s_strides, unit),
            *in_units(t_strides, unit),
            *in_units(gs_strides, unit),
            *in_units(gt_strides, unit),
            V=num_classes,
            UNIT=unit,
            **tile,
            T_PTR=isinstance(scale.temperature, torch.Tensor),
            DIVISOR_PTR=isinstance(scale.divisor, torch.Tensor),
            WEIGHT=scale.weight is not None,
            MASK=scale.mask is not None,
            UPSTREAM=0 if upstream is None else 1 if upstream.dim() == 0 else 2,
            EARLY_EXIT=exit_if_one,
            GRAD_S=grad_student is not None,
            GRAD_T=grad_teacher is not None,
            STORE_ROWS=rows is not None,
            REDUCE=in_launch,
            num_warps=plan.num_warps,
            num_ctas=plan.num_ctas,
            enable_fp_fusion=True,
        )
    if reduce and not in_launch:
        return rows.sum()
    return loss if reduce else rows


def _plan(
    student: torch.Tensor,
    teacher: torch.Tensor,
    grad_student: torch.Tensor | None,
    grad_teacher: torch.Tensor | None,
    layout: RowLayout,
    num_classes: int,
    plain: bool,
) -> KLPlan:
    tensors = [x for x in (student, teacher, grad_student, grad_teacher) if x is not None]
    itemsize = max(student.itemsize, teacher.itemsize)
    outer, _, class_stride = layout.strides[0]
    unaligned = (
        layout.inner == 1
        and class_stride == 1
        and outer * itemsize % 16 != 0
        and all(strides == layout.strides[0] for strides in layout.strides)
        and all(x.itemsize == itemsize and x.data_ptr() % 16 == 0 for x in tensors)
    )
    return kl_plan(
        num_classes,
        layout.inner,
        min(strides[2] for strides in layout.strides[:2]),
        itemsize,
        num_rows=layout.outer * layout.inner,
        machine=machine_of(student.device),
        unaligned=unaligned,
        both=grad_teacher is not None,
        plain=plain,
    )


def _kernel(plan: KLPlan, layout: RowLayout, num_classes: int) -> tuple[Any, dict[str, Any]]:
    """The kernel of a plan, and the arguments that only it has."""
    if plan.regime == "class_tuple":
        return _kl_classes.kd_kl_classes_kernel, {"PIXELS": plan.rows}
    if plan.regime == "two_pass":
        return _kl_two_pass.kd_kl_two_pass_kernel, {"BLOCK": plan.chunks}
    if plan.regime == "split":
        blocks = triton.cdiv(num_classes, plan.chunks * plan.splits)
        return _kl_split.kd_kl_split_kernel, {
            "BLOCK": plan.chunks,
            "SPLITS": plan.splits,
            "PART": blocks * plan.chunks,
        }
    if plan.regime == "chunks":
        return _kl_chunks.kd_kl_chunks_kernel, {
            "CHUNKS": plan.chunks,
            "ROWS": plan.rows,
            "WIDTH": plan.width,
            "WINDOW": plan.window,
        }
    return _kl_rows.kd_kl_tile_kernel, {
        "LAYOUT": plan.layout,
        "CHUNKS": plan.chunks,
        "ROWS": plan.rows,
        "WIDTH": plan.width,
        "INNER_ONE": layout.inner == 1,
    }


def _label_arguments(labels: Labels) -> dict[str, Any]:
    return {
        "label_ptr": labels.label,
        "factor_ptr": labels.factor,
        "second_label_ptr": labels.second,
        "second_factor_ptr": labels.second_factor,
        "smoothing": float(labels.smoothing),
        "LABELS": 1 if labels.second is None else 2,
    }


def _statistics_arguments(statistics: Statistics) -> dict[str, Any]:
    return {
        "class_ptr": statistics.teacher_class,
        "probability_ptr": statistics.teacher_prob,
        "agreement_ptr": statistics.agreement,
        "STATS": True,
    }
