"""Launch of the DIST kernels; the equation is in the package."""

from __future__ import annotations

import torch
import triton

from ..common.launch_rows import rows_of
from ..common.scale import Scale, value_and_pointer
from ..launch import arrival_counter, device_guard, launch
from . import bodies
from .plan import dist_plan


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
    at = rows_of((student, teacher), (grad_student, grad_teacher), student.dim() - 1)
    student, teacher, grad_student, grad_teacher = at.tensors
    num_rows, num_classes = at.num_rows, at.num_classes
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
    row_tile = {"UNIT": at.unit, "ROWS": plan.rows, "BLOCK": plan.block}
    row_grid = (triton.cdiv(num_rows, plan.rows),)
    with device_guard(student):
        launch(
            bodies.dist_rows_kernel,
            row_grid,
            student, teacher, row_values, upstream, *temperature, num_rows, at.layout.inner, *at.strides[:6],
            **row_tile, **common,
        )  # fmt: skip
        launch(
            bodies.dist_columns_kernel,
            (column_groups, plan.splits),
            student, teacher, row_values, parts, upstream, *temperature,
            num_rows, at.layout.inner, plan.rows_per_split, *at.strides[:6],
            UNIT=at.unit, ROWS=plan.tile_rows, COLUMNS=plan.columns, **common,
        )  # fmt: skip
        launch(
            bodies.dist_merge_kernel,
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
                bodies.dist_gradient_kernel,
                row_grid,
                student, teacher, grad_student, grad_teacher, row_values, column_values, upstream,
                *temperature, *divisor, float(beta), float(gamma), num_rows, at.layout.inner,
                *at.strides,
                DIVISOR_PTR=divisor_ptr, UPSTREAM=upstream is not None,
                GRAD_S=grad_student is not None, GRAD_T=grad_teacher is not None, **row_tile, **common,
            )  # fmt: skip
    at.copy_back()
    return loss
