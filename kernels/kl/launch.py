"""Launch of the KL kernels: outputs, strides and arguments; the equation and the plans are in the package."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from ..common.launch_rows import Rows, launch_rows, loop_sizes, nothing, outputs, rows_of
from ..common.scale import Scale, value_and_pointer
from ..common.tile import tile_grid, tile_sizes
from ..launch import device_guard, launch
from ..machine import machine_of
from . import chunks as _kl_chunks
from . import classes as _kl_classes
from . import rows as _kl_rows
from . import split as _kl_split
from . import two_pass as _kl_two_pass
from .plan import KLPlan, kl_plan


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
        grad_student: Written with the gradient, when given; its own strides. It may be ``student`` itself.
        grad_teacher: The same for the teacher.
        upstream: Multiplies loss and gradients: one value, or contiguous, one a row.
        exit_if_one: Do nothing if the single upstream value is 1: the gradients are there already.
        labels: Add the cross-entropy with these labels.
        statistics: Also written.

    Returns:
        The 0-d loss when ``reduce``, else one float32 value a row.
    """
    scale = scale.on(student.device)
    rows, loss = outputs(student, dim, reduce=reduce, want_rows=want_rows)
    if student.numel() == 0:
        return nothing(rows, loss, scale)
    at = rows_of((student, teacher), (grad_student, grad_teacher), dim)
    plan = _plan(at, plain=labels is None and statistics is None)
    # A cluster's programs would each count themselves, so its rows are summed by a launch of their own.
    apart = reduce and plan.regime == "cluster"
    if apart:
        rows, _ = outputs(student, dim, reduce=False, want_rows=True)
    (programs,) = tile_grid(plan, at.layout)
    grid = (programs * plan.splits,)
    kernel, own = _kernel(plan, at)
    if labels is not None:
        own |= _label_arguments(labels)
    if statistics is not None:
        own |= _statistics_arguments(statistics)
    if plan.regime == "split":
        own["sums_ptr"] = _split_sums(grid, at, scale, upstream, exit_if_one, plan, own["PART"])
    launch_rows(
        kernel,
        grid,
        at,
        rows,
        loss,
        scale,
        upstream,
        exit_if_one,
        in_launch=not apart,
        num_warps=plan.num_warps,
        num_ctas=plan.num_ctas,
        **own,
    )
    if apart:
        return rows.sum()
    return loss if reduce else rows


def _split_sums(
    grid: tuple[int],
    at: Rows,
    scale: Scale,
    upstream: torch.Tensor | None,
    exit_if_one: bool,
    plan: KLPlan,
    part: int,
) -> torch.Tensor:
    """The first of a split row's launches: five numbers a part."""
    student, teacher = at.tensors[:2]
    sums = student.new_empty((grid[0], 5), dtype=torch.float32)
    with device_guard(student):
        launch(
            _kl_split.kd_kl_split_sums_kernel,
            grid,
            student,
            teacher,
            sums,
            upstream,
            *value_and_pointer(scale.temperature),
            at.layout.inner,
            *at.strides[:6],
            V=at.num_classes,
            UNIT=at.unit,
            **loop_sizes(plan, at),
            SPLITS=plan.splits,
            PART=part,
            T_PTR=isinstance(scale.temperature, torch.Tensor),
            EARLY_EXIT=exit_if_one,
            num_warps=plan.num_warps,
            enable_fp_fusion=True,
        )
    return sums


def _plan(at: Rows, *, plain: bool) -> KLPlan:
    student, teacher, _, grad_teacher = at.tensors
    layout, tensors = at.layout, [x for x in at.tensors if x is not None]
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
        at.num_classes,
        layout.inner,
        min(strides[2] for strides in layout.strides[:2]),
        itemsize,
        num_rows=at.num_rows,
        machine=machine_of(student.device),
        unaligned=unaligned,
        both=grad_teacher is not None,
        plain=plain,
        in_place=_in_place(at),
    )


def _in_place(at: Rows) -> bool:
    """Whether a gradient lies in the memory of the logits."""
    reads, gradients = at.tensors[:2], at.tensors[2:]
    held = {x.untyped_storage().data_ptr() for x in reads if x is not None} - {0}  # 0: no memory, as on meta
    return any(x is not None and x.untyped_storage().data_ptr() in held for x in gradients)


def _kernel(plan: KLPlan, at: Rows) -> tuple[Any, dict[str, Any]]:
    """The kernel of a plan, and the arguments that only it has."""
    if plan.regime == "class_tuple":
        return _kl_classes.kd_kl_classes_kernel, {"PIXELS": plan.rows}
    if plan.regime == "two_pass":
        return _kl_two_pass.kd_kl_two_pass_kernel, loop_sizes(plan, at)
    if plan.regime == "split":
        part = triton.cdiv(at.num_classes, plan.block * plan.splits) * plan.block
        return _kl_split.kd_kl_split_kernel, loop_sizes(plan, at) | {"SPLITS": plan.splits, "PART": part}
    sizes = tile_sizes(plan, at.layout)
    if plan.regime == "chunks":
        own = {name: sizes[name] for name in ("CHUNKS", "ROWS", "WIDTH")}
        return _kl_chunks.kd_kl_chunks_kernel, own | {"WINDOW": plan.window}
    return _kl_rows.kd_kl_tile_kernel, sizes


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
