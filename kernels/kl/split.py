"""Few long rows: each is split over programs, in two launches. Equations, bytes and launch plans stand in the package.

The first launch leaves five numbers a part (log-sum-exps and Σ e^t·(t - s)), the second adds up a row's parts and
writes the gradients: 5N like the two-pass kernel, by as many programs as the machine has.
"""

import triton
import triton.language as tl

from ..common.rows import finished, gradient_row, in_strides, row_scale, scalar
from ..common.tile import store_losses
from .stream import first_read, gradients, sums_of


@triton.jit
def kd_kl_split_sums_kernel(
    s_ptr, t_ptr, sums_ptr, upstream_ptr, temperature, temperature_ptr, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class,
    V: tl.constexpr, UNIT: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr,
    SPLITS: tl.constexpr, PART: tl.constexpr,
    T_PTR: tl.constexpr, EARLY_EXIT: tl.constexpr,
):  # fmt: skip
    """Peak and sum of student and teacher, and the cross sum, of one part of one row."""
    if EARLY_EXIT:
        if tl.load(upstream_ptr).to(tl.float32) == 1.0:
            return
    k = 1.4426950408889634 / scalar(temperature, temperature_ptr, T_PTR)
    row, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    outer, within = in_strides(row // inner, row % inner, UNIT)
    s_row = s_ptr + outer * s_outer + within * s_inner
    t_row = t_ptr + outer * t_outer + within * t_inner
    s_peak, s_acc, t_peak, t_acc, cross, _, _, _, _ = first_read(
        s_row, t_row, s_class, t_class, k, part * PART, V, PART, THREADS, VECTOR, ALONG, 0, False
    )
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    t_lane = tl.exp2((t_peak - t_max) * k)
    out = sums_ptr + tl.program_id(0) * 5
    tl.store(out, s_max)
    tl.store(out + 1, tl.sum(s_acc * tl.exp2((s_peak - s_max) * k), axis=0))
    tl.store(out + 2, t_max)
    tl.store(out + 3, tl.sum(t_acc * t_lane, axis=0))
    tl.store(out + 4, tl.sum(cross * t_lane, axis=0))


@triton.jit
def kd_kl_split_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    sums_ptr,
    V: tl.constexpr, UNIT: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr,
    SPLITS: tl.constexpr, PART: tl.constexpr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr, RARE: tl.constexpr = True,
):  # fmt: skip
    """Gradients of one part of one row; its first part also has the row's loss."""
    if finished(upstream_ptr, EARLY_EXIT):
        return
    row, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    outer, within = in_strides(row // inner, row % inner, UNIT)
    scale, counts, inv_t, k = row_scale(
        row, row < num_rows, temperature, temperature_ptr, divisor, divisor_ptr, weight_ptr, mask_ptr, upstream_ptr,
        T_PTR, DIVISOR_PTR, WEIGHT, MASK, UPSTREAM,
    )  # fmt: skip
    s_row = s_ptr + outer * s_outer + within * s_inner
    t_row = t_ptr + outer * t_outer + within * t_inner
    gs_row, gt_row = s_row, t_row  # where none is wanted: a tuple takes no None
    if GRAD_S:
        gs_row = gradient_row(gs_ptr, outer, within, gs_outer, gs_inner, GRAD_S)
    if GRAD_T:
        gt_row = gradient_row(gt_ptr, outer, within, gt_outer, gt_inner, GRAD_T)

    sums = sums_ptr + (row * SPLITS + tl.arange(0, SPLITS)) * 5
    s_top, t_top, s_inv, t_inv, log_ratio, kl = sums_of(
        tl.load(sums), tl.load(sums + 1), tl.load(sums + 2), tl.load(sums + 3), tl.load(sums + 4), k
    )
    g = tl.where(counts, scale * inv_t, 0.0)
    kl = gradients(
        (s_row, t_row, gs_row, gt_row), (s_class, t_class, gs_class, gt_class), g, counts,
        (s_top, t_top, s_inv, t_inv, log_ratio, k), kl, (0.0, 0.0, 0, 0, 0.0, 0.0, 0.0), part * PART,
        V, PART, THREADS, VECTOR, ALONG, GRAD_S, GRAD_T, MASK, 0, RARE,
    )  # fmt: skip
    loss = tl.where(counts & (part == 0), scale * kl, 0.0)
    store_losses(loss, row, part == 0, rows_ptr, loss_ptr, partial_ptr, counter_ptr, STORE_ROWS, REDUCE, True)
