"""Launch of the JSD and DKD kernels; the equations are in the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from ..common.scale import Scale, in_units, value_and_pointer
from ..launch import arrival_counter, as_rows, device_guard, launch
from ..machine import triton_version
from . import rows as _pair_rows

JSD, DKD = 0, 1

# Orders of a tile's dimensions, as kl/rows.py reads them.
CHUNK_ROW_LANE, ROW_CHUNK_LANE, CLASS_PIXEL, ONE_ROW = range(4)

#: A row pair up to this many classes stays in registers; half as many where both gradients are written, which
#: spills on sm_100.
MAX_ROW = 8192
#: The same for the class dimension of [B, C, H, W].
MAX_CLASSES = 256


@dataclass(frozen=True)
class PairPlan:
    """What one launch looks like.

    Attributes:
        regime: ``"rows"`` (rows in registers), ``"classes"`` (class dimension not last) or ``"loop"``.
        layout: The tile's order, one of the constants above.
        chunks: Classes a lane group steps over; ``chunks * width`` ≥ V (for loop: one block).
        rows: Rows (or pixels) a program handles.
        width: Neighbouring classes handled together by one row's lanes.
        num_warps: Warps a program.
    """

    regime: str
    layout: int
    chunks: int
    rows: int
    width: int
    num_warps: int


def pair_plan(
    num_classes: int, inner: int, class_stride: int, itemsize: int, *, both: bool = False
) -> PairPlan:
    """Choose the launch plan of the JSD and DKD kernels.

    As the KL kernel's, with half the elements a thread: a class's two derivatives live beside its two
    probabilities. Chosen by registers and spills of compiled variants, not by timings.

    Args:
        num_classes: V.
        inner: Rows that are neighbours in memory; 1 when the class dimension is the last.
        class_stride: Elements between neighbouring classes.
        itemsize: Bytes of the widest logit element.
        both: Whether both gradients are written.
    """
    padded = max(2, triton.next_power_of_2(num_classes))
    if class_stride != 1 and inner > 1 and padded <= MAX_CLASSES:
        return PairPlan(
            "classes", CLASS_PIXEL, padded, max(16, min(256, 2048 // padded)), 1, 8 if padded > 128 else 4
        )
    if padded > (MAX_ROW // 2 if both else MAX_ROW):
        # 16 bytes a thread. Twice that spills on sm_80, and so do twice the warps on sm_100.
        return PairPlan("loop", ONE_ROW, 2048 // itemsize, 1, 1, 4)
    if padded > 512:
        return PairPlan("rows", ONE_ROW, padded, 1, 1, max(4, padded // 512))
    vector = 16 // itemsize
    while vector > 2 and num_classes % vector:  # a pair at least: single lanes compile badly
        vector //= 2
    lanes = min(32, max(1, padded // 16))
    width = min(padded, lanes * vector)
    order = ROW_CHUNK_LANE if triton_version() < (3, 7) else CHUNK_ROW_LANE
    return PairPlan("rows", order, padded // width, 128 // lanes, width, 4)


def pair_loss(
    kind: int,
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor | None,
    alpha: float,
    beta: float,
    dim: int,
    scale: Scale,
    *,
    reduce: bool,
    want_rows: bool = True,
    grad_student: torch.Tensor | None = None,
    grad_teacher: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
) -> torch.Tensor:
    """Launch the JSD or DKD kernel once.

    Args:
        kind: ``JSD`` or ``DKD``.
        student: Logits, any strides; bfloat16, float16 or float32.
        teacher: Logits of the same shape, its own strides and dtype.
        target: The rows' target classes, contiguous, for DKD.
        alpha: DKD's α.
        beta: β of either loss.
        dim: Class dimension, non-negative.
        scale: The row factors.
        reduce: Also sum the rows, in this launch and in a fixed order.
        want_rows: Store the rows (implied when not ``reduce``).
        grad_student: Written with the gradient, when given; its own strides.
        grad_teacher: The same for the teacher.
        upstream: Multiplies loss and gradients: one value, or contiguous, one a row.
        exit_if_one: Do nothing if the single upstream value is 1: the gradients are there already.

    Returns:
        The 0-d loss when ``reduce``, else one float32 value a row.
    """
    shape = student.shape[:dim] + student.shape[dim + 1 :]
    num_rows, num_classes = shape.numel(), student.shape[dim]
    rows = student.new_empty(shape, dtype=torch.float32) if want_rows or not reduce else None
    loss = student.new_empty((), dtype=torch.float32) if reduce else None
    if num_rows == 0 or num_classes == 0:
        return loss.zero_() if loss is not None else rows.zero_()

    wanted = [grad_student, grad_teacher]
    layout = as_rows([x for x in (student, teacher, *wanted) if x is not None], dim)
    if layout is None:  # more than two groups of strides: the one case that is copied
        student, teacher = student.contiguous(), teacher.contiguous()
        # Cloned, not just allocated: with exit_if_one the kernel may leave what is there already.
        contiguous = torch.contiguous_format
        grad_student, grad_teacher = (g if g is None else g.clone(memory_format=contiguous) for g in wanted)
        layout = as_rows([x for x in (student, teacher, grad_student, grad_teacher) if x is not None], dim)
    strides = iter(layout.strides)
    s_strides, t_strides = next(strides), next(strides)
    gs_strides = next(strides) if grad_student is not None else (0, 0, 0)
    gt_strides = next(strides) if grad_teacher is not None else (0, 0, 0)

    itemsize = max(student.itemsize, teacher.itemsize)
    plan = pair_plan(
        num_classes, layout.inner, min(s_strides[2], t_strides[2]), itemsize, both=None not in wanted
    )
    if plan.regime == "classes":
        grid = (layout.outer * triton.cdiv(layout.inner, plan.rows),)
    else:
        grid = (triton.cdiv(num_rows, plan.rows),)
    partial = student.new_empty(grid, dtype=torch.float32) if reduce else None
    counter = arrival_counter(student.device) if reduce else None
    unit = math.gcd(16, *(stride[0] for stride in (s_strides, t_strides, gs_strides, gt_strides)))
    kernel = _pair_rows.pair_loop_kernel if plan.regime == "loop" else _pair_rows.pair_tile_kernel
    tile = (
        {"BLOCK": plan.chunks}
        if plan.regime == "loop"
        else {
            "LAYOUT": plan.layout,
            "CHUNKS": plan.chunks,
            "ROWS": plan.rows,
            "WIDTH": plan.width,
            "INNER_ONE": layout.inner == 1,
        }
    )
    with device_guard(student):
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
            target,
            *value_and_pointer(scale.temperature),
            *value_and_pointer(scale.divisor),
            float(alpha),
            float(beta),
            num_rows,
            layout.inner,
            *in_units(s_strides, unit),
            *in_units(t_strides, unit),
            *in_units(gs_strides, unit),
            *in_units(gt_strides, unit),
            V=num_classes,
            UNIT=unit,
            KIND=kind,
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
            REDUCE=reduce,
            num_warps=plan.num_warps,
            enable_fp_fusion=True,
        )
    for given, computed in zip(wanted, (grad_student, grad_teacher)):
        if given is not computed:
            given.copy_(computed)
    return loss if reduce else rows
