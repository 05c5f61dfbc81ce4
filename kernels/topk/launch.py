"""Launch of the kernel for cached top-k teachers; the equation is in the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from ..common.scale import Scale, in_units, value_and_pointer
from ..launch import arrival_counter, as_rows, device_guard, launch
from . import rows as _topk_rows


@dataclass(frozen=True)
class TopKPlan:
    """What one launch looks like.

    Attributes:
        block: Classes read at a time.
        wide: Lanes for the k outcomes, a power of two.
        num_warps: Warps a program.
    """

    block: int
    wide: int
    num_warps: int


def topk_plan(num_classes: int, k: int) -> TopKPlan:
    """One row a program: at most 4096 classes at a time, 16 a thread."""
    block = min(4096, max(32, triton.next_power_of_2(num_classes)))
    return TopKPlan(block, max(2, triton.next_power_of_2(k)), min(8, max(1, block // 512)))


def topk(
    student: torch.Tensor,
    index: torch.Tensor,
    logits: torch.Tensor,
    normalizer: torch.Tensor | None,
    scale: Scale,
    *,
    bucket: bool,
    reduce: bool,
    want_rows: bool = True,
    grad_student: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
) -> torch.Tensor:
    """Launch the kernel once.

    Args:
        student: Logits ``[..., V]``, any strides; bfloat16, float16 or float32.
        index: int64 ``[..., k]``, contiguous; negative: padding.
        logits: Of the teacher at those classes, contiguous.
        normalizer: The teacher's log-sum-exp at T of each row, contiguous, or None.
        scale: The row factors.
        bucket: Whether the other classes are one more outcome.
        reduce: Also sum the rows, in this launch and in a fixed order.
        want_rows: Store the rows (implied when not ``reduce``).
        grad_student: Written with the gradient, when given; its own strides.
        upstream: Multiplies loss and gradient: one value, or contiguous, one a row.
        exit_if_one: Do nothing if the single upstream value is 1: the gradient is there already.

    Returns:
        The 0-d loss when ``reduce``, else one float32 value a row.
    """
    shape, num_classes, k = student.shape[:-1], student.shape[-1], index.shape[-1]
    rows = student.new_empty(shape, dtype=torch.float32) if want_rows or not reduce else None
    loss = student.new_empty((), dtype=torch.float32) if reduce else None
    if shape.numel() == 0:
        return loss.zero_() if loss is not None else rows.zero_()
    wanted = grad_student
    layout = as_rows([x for x in (student, grad_student) if x is not None], student.dim() - 1)
    if layout is None:  # more than two groups of strides: the one case that is copied
        student = student.contiguous()
        # Cloned, not just allocated: with exit_if_one the kernel may leave what is there already.
        grad_student = wanted if wanted is None else wanted.clone(memory_format=torch.contiguous_format)
        layout = as_rows([x for x in (student, grad_student) if x is not None], student.dim() - 1)
    s_strides = layout.strides[0]
    gs_strides = layout.strides[1] if grad_student is not None else (0, 0, 0)
    plan = topk_plan(num_classes, k)
    grid = (shape.numel(),)
    unit = math.gcd(16, s_strides[0], gs_strides[0])
    with device_guard(student):
        launch(
            _topk_rows.topk_kernel,
            grid,
            student,
            index,
            logits,
            normalizer,
            grad_student,
            rows,
            loss,
            student.new_empty(grid, dtype=torch.float32) if reduce else None,
            arrival_counter(student.device) if reduce else None,
            scale.weight,
            scale.mask,
            upstream,
            *value_and_pointer(scale.temperature),
            *value_and_pointer(scale.divisor),
            shape.numel(),
            layout.inner,
            *in_units(s_strides, unit),
            *in_units(gs_strides, unit),
            V=num_classes,
            UNIT=unit,
            K=k,
            WIDE=plan.wide,
            BLOCK=plan.block,
            BUCKET=bucket,
            NORMALIZER=normalizer is not None,
            T_PTR=isinstance(scale.temperature, torch.Tensor),
            DIVISOR_PTR=isinstance(scale.divisor, torch.Tensor),
            WEIGHT=scale.weight is not None,
            MASK=scale.mask is not None,
            UPSTREAM=0 if upstream is None else 1 if upstream.dim() == 0 else 2,
            EARLY_EXIT=exit_if_one,
            GRAD=grad_student is not None,
            STORE_ROWS=rows is not None,
            REDUCE=reduce,
            num_warps=plan.num_warps,
            enable_fp_fusion=True,
        )
    if wanted is not grad_student:
        wanted.copy_(grad_student)
    return loss if reduce else rows
