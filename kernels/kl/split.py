"""Few long rows: each is split over programs, in two launches. Equations, bytes and launch plans stand in the package.

The first launch leaves five numbers a part (log-sum-exps and Σ e^t·(t - s)), the second adds up a row's parts and
writes the gradients: 5N like the two-pass kernel, by as many programs as the machine has.
"""

import triton
import triton.language as tl

from ..common.reduce import reduce_last
from ..common.rows import row_factor, scalar
from .two_pass import second_pass


@triton.jit
def kd_kl_split_sums_kernel(
    s_ptr, t_ptr, sums_ptr, upstream_ptr, temperature, temperature_ptr, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class,
    V: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
    T_PTR: tl.constexpr, EARLY_EXIT: tl.constexpr,
):  # fmt: skip
    """Peak and sum of student and teacher, and the cross sum, of one part of one row."""
    if EARLY_EXIT:
        if tl.load(upstream_ptr).to(tl.float32) == 1.0:
            return
    k = 1.4426950408889634 / scalar(temperature, temperature_ptr, T_PTR)
    row, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    outer, within = tl.cast(row // inner, tl.int64) * UNIT, tl.cast(row % inner, tl.int64)
    s_row = s_ptr + outer * s_outer + within * s_inner
    t_row = t_ptr + outer * t_outer + within * t_inner
    # Finite, far below any logit: -inf - -inf would be NaN.
    s_peak = tl.full([BLOCK], -1e38, tl.float32)
    t_peak = tl.full([BLOCK], -1e38, tl.float32)
    s_acc = tl.zeros([BLOCK], tl.float32)
    t_acc = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for start in range(0, PART, BLOCK):
        classes = (part * PART + start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = tl.load(s_row + classes * s_class, mask=live, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + classes * t_class, mask=live, other=float("-inf")).to(tl.float32)
        s_new, t_new = tl.maximum(s_peak, s), tl.maximum(t_peak, t)
        t_old, t_exp = tl.exp2((t_peak - t_new) * k), tl.exp2((t - t_new) * k)
        s_acc = s_acc * tl.exp2((s_peak - s_new) * k) + tl.exp2((s - s_new) * k)
        t_acc = t_acc * t_old + t_exp
        cross = cross * t_old + t_exp * tl.maximum(t - s, -1e30)
        s_peak, t_peak = s_new, t_new
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
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr,
    num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    sums_ptr,
    V: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Gradients of one part of one row; its first part also has the row's loss."""
    T = scalar(temperature, temperature_ptr, T_PTR)
    factor = T * T / scalar(divisor, divisor_ptr, DIVISOR_PTR)
    if UPSTREAM == 1:
        upstream = tl.load(upstream_ptr).to(tl.float32)
        if EARLY_EXIT:
            if upstream == 1.0:
                return
        factor *= upstream
    inv_t = 1.0 / T
    k = inv_t * 1.4426950408889634
    row, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    outer, within = tl.cast(row // inner, tl.int64) * UNIT, tl.cast(row % inner, tl.int64)
    scale, counts = row_factor(
        row, row < num_rows, weight_ptr, mask_ptr, upstream_ptr, factor, WEIGHT, MASK, UPSTREAM
    )
    s_row = s_ptr + outer * s_outer + within * s_inner
    t_row = t_ptr + outer * t_outer + within * t_inner
    gs_row, gt_row = gs_ptr, gt_ptr
    if GRAD_S:
        gs_row += outer * gs_outer + within * gs_inner
    if GRAD_T:
        gt_row += outer * gt_outer + within * gt_inner

    sums = sums_ptr + (row * SPLITS + tl.arange(0, SPLITS)) * 5
    s_peak, t_peak = tl.load(sums), tl.load(sums + 2)
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    t_lane = tl.exp2((t_peak - t_max) * k)
    s_inv = 1.0 / tl.sum(tl.load(sums + 1) * tl.exp2((s_peak - s_max) * k), axis=0)
    t_sum = tl.sum(tl.load(sums + 3) * t_lane, axis=0)
    t_inv = 1.0 / t_sum
    s_top, t_top = s_max * k, t_max * k
    log_ratio = (t_top - s_top) + tl.log2(t_sum * s_inv)
    kl = (tl.sum(tl.load(sums + 4) * t_lane, axis=0) * t_inv * k - log_ratio) * 0.6931471805599453
    g = tl.where(counts, scale * inv_t, 0.0)
    begin = part * PART
    if kl < 1e-3:
        # Nearly equal, and rare: each program sums the whole row again, from the cache, and needs no third launch.
        kl, centre = second_pass(
            s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, g, counts,
            k, s_top, t_top, s_inv, t_inv, log_ratio, 0.0, 0.0,
            0.0, 0.0, 0, 0, 0.0, 0.0, 0.0, 0,
            V, V, BLOCK, True, False, False, MASK, 0,
        )  # fmt: skip
        if GRAD_S or GRAD_T:
            second_pass(
                s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, g, counts,
                k, s_top, t_top, s_inv, t_inv, log_ratio, centre, kl,
                0.0, 0.0, 0, 0, 0.0, 0.0, 0.0, begin,
                V, PART, BLOCK, True, GRAD_S, GRAD_T, MASK, 0,
            )  # fmt: skip
    else:
        if GRAD_S or GRAD_T:
            second_pass(
                s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, g, counts,
                k, s_top, t_top, s_inv, t_inv, log_ratio, 0.0, kl,
                0.0, 0.0, 0, 0, 0.0, 0.0, 0.0, begin,
                V, PART, BLOCK, False, GRAD_S, GRAD_T, MASK, 0,
            )  # fmt: skip
    loss = tl.where(counts & (part == 0), scale * kl, 0.0)
    if STORE_ROWS:
        if part == 0:
            tl.store(rows_ptr + row, loss)
    if REDUCE:
        reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
