"""Rows of any length in one program, read twice. Equations, bytes and launch plans stand in the package."""

import triton
import triton.language as tl

from ..common.rows import (
    finished,
    gap_of,
    gradient_row,
    in_strides,
    load_logits,
    more_logits,
    near_terms,
    no_logits,
    row_scale,
    store_gradient,
)
from ..common.tile import store_losses
from .labels import label_gradient, label_loss, labels_of


@triton.jit
def more_cross(peak, total, cross, s, t, k):
    """(peak, sum) of the teacher with one more logit a lane, and Σ e^t·(t - s)."""
    new = tl.maximum(peak, t)
    old, now = tl.exp2((peak - new) * k), tl.exp2((t - new) * k)
    return new, total * old + now, cross * old + now * tl.maximum(t - s, -1e30)


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
        s, t = load_logits(s_row, classes, s_class, live), load_logits(t_row, classes, t_class, live)
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
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr, num_rows, inner,
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
    if finished(upstream_ptr, EARLY_EXIT):
        return
    row = tl.program_id(0)
    outer, within = in_strides(row // inner, row % inner, UNIT)
    scale, counts, inv_t, k = row_scale(
        row, row < num_rows, temperature, temperature_ptr, divisor, divisor_ptr, weight_ptr, mask_ptr, upstream_ptr,
        T_PTR, DIVISOR_PTR, WEIGHT, MASK, UPSTREAM,
    )  # fmt: skip
    s_row = s_ptr + outer * s_outer + within * s_inner
    t_row = t_ptr + outer * t_outer + within * t_inner

    # Log-sum-exps a lane, and Σ e^t·(t - s), which gives KL for the teacher's gradient before the second pass begins.
    s_peak, s_acc = no_logits([BLOCK])
    t_peak, t_acc = no_logits([BLOCK])
    cross = tl.zeros([BLOCK], tl.float32)
    # Σ exp at temperature 1: the student's for labels, else the teacher's.
    total_acc = tl.zeros([BLOCK], tl.float32)
    logit_sum = tl.zeros([BLOCK], tl.float32)
    s_rank = tl.zeros([BLOCK], tl.int32)
    t_rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s, t = load_logits(s_row, classes, s_class, live), load_logits(t_row, classes, t_class, live)
        s_new, s_acc = more_logits(s_peak, s_acc, s, k)
        t_new, t_acc, cross = more_cross(t_peak, t_acc, cross, s, t, k)
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
        label, first, logit, second_label, second, second_logit = labels_of(
            label_ptr, factor_ptr, second_label_ptr, second_factor_ptr, s_row, s_class, row, row < num_rows, counts,
            weight_ptr, upstream_ptr, V, LABELS, WEIGHT, UPSTREAM,
        )  # fmt: skip
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
    gs_row = gradient_row(gs_ptr, outer, within, gs_outer, gs_inner, GRAD_S)
    gt_row = gradient_row(gt_ptr, outer, within, gt_outer, gt_inner, GRAD_T)
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
    store_losses(loss, row, None, rows_ptr, loss_ptr, partial_ptr, counter_ptr, STORE_ROWS, REDUCE, True)
