"""Launch of the DIST kernels; the equation is in the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from . import rows as _dist_rows
from ..launch import arrival_counter, as_rows, device_guard, launch
from ..common.scale import Scale, in_units, value_and_pointer


@dataclass(frozen=True)
class DistPlan:
    """What the launches look like.

    Attributes:
        rows: Rows of a program of the row and gradient kernels.
        block: Classes they read at a time.
        tile_rows: Rows that a program of the column kernel reads at a time.
        columns: Its columns.
        splits: Programs that share a group of columns, each taking a stretch of rows.
        rows_per_split: The length of that stretch.
        num_warps: Warps a program, of every kernel.
    """

    rows: int
    block: int
    tile_rows: int
    columns: int
    splits: int
    rows_per_split: int
    num_warps: int


def dist_plan(num_rows: int, num_classes: int) -> DistPlan:
    """Tiles of about 2048 elements; the columns' rows are split until some 512 programs are busy."""
    block = min(2048, max(16, triton.next_power_of_2(num_classes)))
    columns = min(64, block)
    tile_rows = 2048 // columns
    wanted = max(1, 512 // triton.cdiv(num_classes, columns))
    splits = max(1, min(wanted, triton.cdiv(num_rows, 4 * tile_rows)))
    rows_per_split = triton.cdiv(num_rows, splits)
    return DistPlan(
        max(1, 2048 // block),
        block,
        tile_rows,
        columns,
        triton.cdiv(num_rows, rows_per_split),
        rows_per_split,
        4,
    )


def dist(
    student: torch.Tensor,
    teacher: torch.Tensor,
    beta: float,
    gamma: float,
    scale: Scale,
    *,
    reduce: bool = True,
    grad_student: torch.Tensor | None = None,
    grad_teacher: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
) -> torch.Tensor | None:
    """Three launches for the loss, one more for gradients.

    Args:
        student: Logits ``[..., V]``, any strides; bfloat16, float16 or float32.
        teacher: Logits of the same shape, its own strides and dtype.
        beta: Weight of the rows' correlation.
        gamma: Weight of the columns'.
        scale: Temperature and divisor; no row factors.
        reduce: Write the loss.
        grad_student: Written with the gradient, when given; its own strides.
        grad_teacher: The same for the teacher.
        upstream: One value that multiplies the gradients.
        exit_if_one: Do nothing if it is 1: the gradients are there already.

    Returns:
        The 0-d loss when ``reduce``, else None.
    """
    wanted = [grad_student, grad_teacher]
    last = student.dim() - 1
    layout = as_rows([x for x in (student, teacher, *wanted) if x is not None], last)
    if layout is None:  # more than two groups of strides: the one case that is copied
        student, teacher = student.contiguous(), teacher.contiguous()
        # Cloned, not just allocated: with exit_if_one the kernels may leave what is there already.
        contiguous = torch.contiguous_format
        grad_student, grad_teacher = (g if g is None else g.clone(memory_format=contiguous) for g in wanted)
        layout = as_rows([x for x in (student, teacher, grad_student, grad_teacher) if x is not None], last)
    strides = iter(layout.strides)
    s_strides, t_strides = next(strides), next(strides)
    gs_strides = next(strides) if grad_student is not None else (0, 0, 0)
    gt_strides = next(strides) if grad_teacher is not None else (0, 0, 0)
    unit = math.gcd(16, *(stride[0] for stride in (s_strides, t_strides, gs_strides, gt_strides)))
    reads = (*in_units(s_strides, unit), *in_units(t_strides, unit))

    num_rows, num_classes = student.shape[:-1].numel(), student.shape[-1]
    plan = dist_plan(num_rows, num_classes)
    column_groups = triton.cdiv(num_classes, plan.columns)
    row_values = student.new_empty(6, num_rows, dtype=torch.float32)
    parts = student.new_empty(plan.splits, 5, num_classes, dtype=torch.float32)
    column_values = student.new_empty(5, num_classes, dtype=torch.float32)
    loss = student.new_empty((), dtype=torch.float32) if reduce else None
    temperature, divisor = value_and_pointer(scale.temperature), value_and_pointer(scale.divisor)
    common = {
        "V": num_classes,
        "T_PTR": isinstance(scale.temperature, torch.Tensor),
        "EARLY_EXIT": exit_if_one,
        "num_warps": plan.num_warps,
        "enable_fp_fusion": True,
    }
    divisor_ptr = isinstance(scale.divisor, torch.Tensor)
    row_tile = {"UNIT": unit, "ROWS": plan.rows, "BLOCK": plan.block}
    row_grid = (triton.cdiv(num_rows, plan.rows),)
    with device_guard(student):
        launch(
            _dist_rows.dist_rows_kernel,
            row_grid,
            student, teacher, row_values, upstream, *temperature, num_rows, layout.inner, *reads,
            **row_tile, **common,
        )  # fmt: skip
        launch(
            _dist_rows.dist_columns_kernel,
            (column_groups, plan.splits),
            student, teacher, row_values, parts, upstream, *temperature,
            num_rows, layout.inner, plan.rows_per_split, *reads,
            UNIT=unit, ROWS=plan.tile_rows, COLUMNS=plan.columns, **common,
        )  # fmt: skip
        launch(
            _dist_rows.dist_merge_kernel,
            (column_groups,),
            row_values, parts, column_values,
            student.new_empty(column_groups, dtype=torch.float32) if reduce else None,
            arrival_counter(student.device) if reduce else None,
            loss, upstream, *temperature, *divisor, float(beta), float(gamma),
            num_rows, plan.rows_per_split, plan.splits,
            COLUMNS=plan.columns, DIVISOR_PTR=divisor_ptr, REDUCE=reduce, **common,
        )  # fmt: skip
        if grad_student is not None or grad_teacher is not None:
            launch(
                _dist_rows.dist_gradient_kernel,
                row_grid,
                student, teacher, grad_student, grad_teacher, row_values, column_values, upstream,
                *temperature, *divisor, float(beta), float(gamma), num_rows, layout.inner,
                *reads, *in_units(gs_strides, unit), *in_units(gt_strides, unit),
                DIVISOR_PTR=divisor_ptr, UPSTREAM=upstream is not None,
                GRAD_S=grad_student is not None, GRAD_T=grad_teacher is not None, **row_tile, **common,
            )  # fmt: skip
    for given, computed in zip(wanted, (grad_student, grad_teacher)):
        if given is not computed:
            given.copy_(computed)
    return loss
