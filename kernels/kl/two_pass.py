"""Rows of any length in one program, read twice. Equations, bytes and launch plans stand in the package."""

import triton
import triton.language as tl

from ..common.reduce import reduce_last
from ..common.rows import gap_of, near_terms, row_factor, scalar, store_gradient
from .labels import label_gradient, label_loss, label_of


@triton.jit
def second_pass(
    s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class,
    g, counts, k, s_top, t_top, s_inv, t_inv, log_ratio, centre, kl,
    peak, inv_total, label, second_label, first, second, smoothing, begin,
    V: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, NEAR: tl.constexpr,
    STORE_S: tl.constexpr, STORE_T: tl.constexpr, MASK: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Read LENGTH classes of a row once more: store their gradients, and return their part of (KL, S).

    NEAR takes the form that does not cancel.
    """
    kl_sum = tl.zeros([BLOCK], tl.float32)
    centre_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, LENGTH, BLOCK):
        classes = (begin + start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = tl.load(s_row + classes * s_class, mask=live, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + classes * t_class, mask=live, other=float("-inf")).to(tl.float32)
        q = tl.exp2(s * k - s_top) * s_inv
        p = tl.exp2(t * k - t_top) * t_inv
        gap = gap_of(s, t, k, log_ratio)
        if NEAR:
            term, difference, delta = near_terms(gap, p, q, t > float("-inf"))
            centre_sum += difference
        else:
            delta = gap * 0.6931471805599453
            difference = q - p
            term = p * delta
        kl_sum += term
        if STORE_S:
            grad = g * (difference - centre * q)
            if LABELS > 0:
                probability = tl.exp2((s - peak) * 1.4426950408889634) * inv_total
                grad += label_gradient(probability, classes, label, second_label, first, second, smoothing, V)
            store_gradient(gs_row + classes * gs_class, grad, counts, live, MASK)
        if STORE_T:
            store_gradient(gt_row + classes * gt_class, g * p * (delta + centre - kl), counts, live, MASK)
    return tl.sum(kl_sum, axis=0), tl.sum(centre_sum, axis=0)


@triton.jit
def kd_kl_two_pass_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr,
    num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
    label_ptr=None, factor_ptr=None, second_label_ptr=None, second_factor_ptr=None, smoothing=0.0,
    class_ptr=None, probability_ptr=None, agreement_ptr=None,
    LABELS: tl.constexpr = 0, STATS: tl.constexpr = False,
):  # fmt: skip
    """Rows that do not fit on the chip: read once for the log-sum-exps, once more for loss and gradients."""
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
    row = tl.program_id(0)
    outer, within = tl.cast(row // inner, tl.int64) * UNIT, tl.cast(row % inner, tl.int64)
    scale, counts = row_factor(
        row, row < num_rows, weight_ptr, mask_ptr, upstream_ptr, factor, WEIGHT, MASK, UPSTREAM
    )
    s_row = s_ptr + outer * s_outer + within * s_inner
    t_row = t_ptr + outer * t_outer + within * t_inner

    # Online log-sum-exp a lane (Milakov & Gimelshein 2018), and Σ e^t·(t - s), which gives KL for the
    # teacher's gradient before the second pass begins. A lane's peak starts far below any logit, and finite:
    # -inf - -inf would be NaN.
    s_peak = tl.full([BLOCK], -1e38, tl.float32)
    t_peak = tl.full([BLOCK], -1e38, tl.float32)
    s_acc = tl.zeros([BLOCK], tl.float32)
    t_acc = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    total_acc = tl.zeros(
        [BLOCK], tl.float32
    )  # Σ exp at temperature 1: the student's for labels, else the teacher's
    logit_sum = tl.zeros([BLOCK], tl.float32)
    s_rank = tl.zeros([BLOCK], tl.int32)
    t_rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = tl.load(s_row + classes * s_class, mask=live, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + classes * t_class, mask=live, other=float("-inf")).to(tl.float32)
        s_new, t_new = tl.maximum(s_peak, s), tl.maximum(t_peak, t)
        t_old, t_exp = tl.exp2((t_peak - t_new) * k), tl.exp2((t - t_new) * k)
        s_acc = s_acc * tl.exp2((s_peak - s_new) * k) + tl.exp2((s - s_new) * k)
        t_acc = t_acc * t_old + t_exp
        cross = cross * t_old + t_exp * tl.maximum(t - s, -1e30)
        if LABELS > 0:
            old = tl.exp2((s_peak - s_new) * 1.4426950408889634)
            total_acc = total_acc * old + tl.exp2((s - s_new) * 1.4426950408889634)
            logit_sum += tl.where(live, s, 0.0)
        if STATS:
            old = tl.exp2((t_peak - t_new) * 1.4426950408889634)
            total_acc = total_acc * old + tl.exp2((t - t_new) * 1.4426950408889634)
            # A lane sees its classes in order: the first of equals stays.
            s_rank = tl.where(s > s_peak, V - classes.to(tl.int32), s_rank)
            t_rank = tl.where(t > t_peak, V - classes.to(tl.int32), t_rank)
        s_peak, t_peak = s_new, t_new
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    s_top, t_top = s_max * k, t_max * k
    t_lane = tl.exp2((t_peak - t_max) * k)
    s_inv = 1.0 / tl.sum(s_acc * tl.exp2((s_peak - s_max) * k), axis=0)
    t_sum = tl.sum(t_acc * t_lane, axis=0)
    t_inv = 1.0 / t_sum
    log_ratio = (t_top - s_top) + tl.log2(t_sum * s_inv)
    kl = (tl.sum(cross * t_lane, axis=0) * t_inv * k - log_ratio) * 0.6931471805599453

    ce, peak, inv_total, label, second_label, first, second = 0.0, 0.0, 0.0, 0, 0, 0.0, 0.0
    if LABELS > 0:
        plain = 1.0
        if UPSTREAM == 1:
            plain = tl.load(upstream_ptr).to(tl.float32)
        weight, _counts = row_factor(
            row, row < num_rows, weight_ptr, mask_ptr, upstream_ptr, plain, WEIGHT, False, UPSTREAM
        )
        label, first, logit = label_of(label_ptr, factor_ptr, s_row, s_class, row, counts, weight, V)
        second_label, second, second_logit = label, first * 0.0, logit
        if LABELS == 2:
            second_label, second, second_logit = label_of(
                second_label_ptr, second_factor_ptr, s_row, s_class, row, counts, weight, V
            )
        total = tl.sum(total_acc * tl.exp2((s_peak - s_max) * 1.4426950408889634), axis=0)
        peak, inv_total = s_max, 1.0 / total
        mean = tl.sum(logit_sum, axis=0) / V
        ce = label_loss(peak + tl.log(total), mean, first, logit, second, second_logit, smoothing)
    if STATS:
        total = tl.sum(total_acc * tl.exp2((t_peak - t_max) * 1.4426950408889634), axis=0)
        s_class_rank = tl.max(tl.where(s_peak == s_max, s_rank, 1), axis=0)
        t_class_rank = tl.max(tl.where(t_peak == t_max, t_rank, 1), axis=0)
        tl.store(class_ptr + row, (V - t_class_rank).to(tl.int64))
        tl.store(probability_ptr + row, 1.0 / total)
        tl.store(agreement_ptr + row, s_class_rank == t_class_rank)
    g = tl.where(counts, scale * inv_t, 0.0)
    gs_row, gt_row = gs_ptr, gt_ptr
    if GRAD_S:
        gs_row += outer * gs_outer + within * gs_inner
    if GRAD_T:
        gt_row += outer * gt_outer + within * gt_inner
    if kl < 1e-3:
        # Student and teacher nearly agree: KL and S first, in the form that does not cancel, then gradients.
        kl, centre = second_pass(
            s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, g, counts,
            k, s_top, t_top, s_inv, t_inv, log_ratio, 0.0, 0.0,
            peak, inv_total, label, second_label, first, second, smoothing, 0,
            V, V, BLOCK, True, False, False, MASK, LABELS,
        )  # fmt: skip
        if GRAD_S or GRAD_T:
            second_pass(
                s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, g, counts,
                k, s_top, t_top, s_inv, t_inv, log_ratio, centre, kl,
            peak, inv_total, label, second_label, first, second, smoothing, 0,
            V, V, BLOCK, True, GRAD_S, GRAD_T, MASK, LABELS,
            )  # fmt: skip
    else:
        kl, _ = second_pass(
            s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, g, counts,
            k, s_top, t_top, s_inv, t_inv, log_ratio, 0.0, kl,
            peak, inv_total, label, second_label, first, second, smoothing, 0,
            V, V, BLOCK, False, GRAD_S, GRAD_T, MASK, LABELS,
        )  # fmt: skip
    loss = tl.where(counts, scale * kl + ce, 0.0)
    if STORE_ROWS:
        tl.store(rows_ptr + row, loss)
    if REDUCE:
        reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
