"""Temperature-scaled KL divergence: loss and exact gradients to student and teacher.

For each row over V classes, with p = softmax(t/T) and q = softmax(s/T) (Hinton et al. 2015):

    KL       = Σ p·(log p - log q)                      loss = Σ_rows c·KL,   c = T²·weight/divisor
    ∂KL/∂s   = (q - p)/T                                ∂KL/∂t = p·(log p - log q - KL)/T

With δ = log p - log q and S = Σ p·expm1(-δ), which is 0 but for the rounding of the two log-sum-exps:

    KL       = Σ p·δ²·h(-δ) where |δ| < 1/2, else p·δ + (q - p);   h(x) = (expm1(x) - x)/x²
    q - p    = p·expm1(-δ) - S·q                        (recentred: exact to 3e-7 at logits 1e-4 apart)

Bytes moved, N = elements of one logit tensor: 2N for the loss alone; 3N with the student's gradient, 4N with
both, written by the forward launch. A backward whose upstream gradient is 1 moves nothing; otherwise it
recomputes (3N or 4N), so that a half-precision gradient is rounded once. Rows that do not fit on the chip
(V > 16384) are read twice: 5N.

Launch plans: :func:`kl_plan`. Kernel bodies: _kl_rows.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from . import _kl_rows
from .launch import arrival_counter, as_rows, device_guard, launch, triton_version

# Orders of a tile's dimensions, as _kl_rows.py reads them.
CHUNK_ROW_LANE, ROW_CHUNK_LANE, CLASS_PIXEL, ONE_ROW = range(4)

#: A row pair up to this many classes stays in registers.
MAX_ROW = 16384
#: The same for the class dimension of [B, C, H, W].
MAX_CLASSES = 512


@dataclass(frozen=True)
class KLPlan:
    """What one launch looks like.

    Attributes:
        regime: ``"rows"`` (rows in registers), ``"classes"`` (class dimension not last) or ``"two_pass"``.
        layout: The tile's order, one of the constants above.
        chunks: Classes a lane group steps over; ``chunks * width`` ≥ V (for two_pass: one block).
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


def kl_plan(num_classes: int, inner: int, class_stride: int, itemsize: int) -> KLPlan:
    """Choose the launch plan of the KL kernels.

    A row's classes are spread over as few lanes as leave each thread about 32 elements of each tensor: fewer
    lanes mean fewer shuffles, more elements mean spills. Tile orders and sizes come from compiled prototypes
    (instructions an element and registers), not from timings.

    Args:
        num_classes: V.
        inner: Rows that are neighbours in memory; 1 when the class dimension is the last.
        class_stride: Elements between neighbouring classes.
        itemsize: Bytes of the widest logit element.
    """
    padded = max(2, triton.next_power_of_2(num_classes))
    if class_stride != 1 and inner > 1 and padded <= MAX_CLASSES:
        # bf16 loads hold 8 pixels a thread: half as many threads as float32 for the same wide loads.
        pixels = max(32, min(256, 8192 // padded)) if itemsize == 2 else max(32, min(256, 4096 // padded))
        warps = 8 if itemsize > 2 and padded * pixels >= 8192 else 4
        return KLPlan("classes", CLASS_PIXEL, padded, pixels, 1, warps)
    if padded > MAX_ROW:
        return KLPlan("two_pass", ONE_ROW, 4096, 1, 1, 8)
    if padded > 1024:
        return KLPlan("rows", ONE_ROW, padded, 1, 1, min(16, max(2, padded // 1024)))
    vector = 16 // itemsize
    while vector > 2 and num_classes % vector:  # a pair at least: single lanes compile badly
        vector //= 2
    lanes = min(32, max(1, padded // 32))
    width = min(padded, lanes * vector)
    order = ROW_CHUNK_LANE if triton_version() < (3, 7) else CHUNK_ROW_LANE
    return KLPlan("rows", order, padded // width, 128 // lanes, width, 4)


class Scale(NamedTuple):
    """What multiplies a row's divergence: T²·weight/divisor, zero where the mask is False.

    ``temperature`` and ``divisor`` are floats, or 0-d tensors on the device that are read by the kernel, so
    that a captured graph sees their current values. ``weight`` and ``mask`` hold one value a row, contiguous.
    """

    temperature: torch.Tensor | float
    divisor: torch.Tensor | float
    weight: torch.Tensor | None
    mask: torch.Tensor | None


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
        )
        for grad, computed in zip((grad_student, grad_teacher), grads):
            if grad is not None:
                grad.copy_(computed)
        return result
    strides = iter(layout.strides)
    s_strides, t_strides = next(strides), next(strides)
    gs_strides = next(strides) if grad_student is not None else (0, 0, 0)
    gt_strides = next(strides) if grad_teacher is not None else (0, 0, 0)

    itemsize = max(student.itemsize, teacher.itemsize)
    plan = kl_plan(num_classes, layout.inner, min(s_strides[2], t_strides[2]), itemsize)
    if plan.regime == "classes":
        grid = (layout.outer * triton.cdiv(layout.inner, plan.rows),)
    else:
        grid = (triton.cdiv(num_rows, plan.rows),)
    partial = student.new_empty(grid, dtype=torch.float32) if reduce else None
    counter = arrival_counter(student.device) if reduce else None
    unit = math.gcd(16, *(stride[0] for stride in (s_strides, t_strides, gs_strides, gt_strides)))
    kernel = _kl_rows.kd_kl_two_pass_kernel if plan.regime == "two_pass" else _kl_rows.kd_kl_tile_kernel
    tile = (
        {"BLOCK": plan.chunks}
        if plan.regime == "two_pass"
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
            *_value_and_pointer(scale.temperature),
            *_value_and_pointer(scale.divisor),
            num_rows,
            layout.inner,
            *_in_units(s_strides, unit),
            *_in_units(t_strides, unit),
            *_in_units(gs_strides, unit),
            *_in_units(gt_strides, unit),
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
            REDUCE=reduce,
            num_warps=plan.num_warps,
            enable_fp_fusion=True,
        )
    return loss if reduce else rows


def _in_units(strides: tuple[int, int, int], unit: int) -> tuple[int, int, int]:
    return strides[0] // unit, strides[1], strides[2]


def _value_and_pointer(value: torch.Tensor | float) -> tuple[float, torch.Tensor | None]:
    return (1.0, value) if isinstance(value, torch.Tensor) else (float(value), None)
