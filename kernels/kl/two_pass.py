"""Rows of any length in one program, read twice. Equations, bytes and launch plans stand in the package."""

import triton
import triton.language as tl

from ..common.rows import finished, gradient_row, in_strides, row_scale
from ..common.tile import store_losses
from .labels import label_loss, labels_of
from .stream import first_read, gradients, sums_of


@triton.jit
def kd_kl_two_pass_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
    label_ptr=None, factor_ptr=None, second_label_ptr=None, second_factor_ptr=None, smoothing=0.0, label_weight=0.0,
    class_ptr=None, probability_ptr=None, agreement_ptr=None,
    LABELS: tl.constexpr = 0, IGNORE: tl.constexpr = None, COUNTED: tl.constexpr = 0,
    STATS: tl.constexpr = False, RARE: tl.constexpr = True,
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

    s_peak, s_acc, t_peak, t_acc, cross, total_acc, logit_sum, s_first, t_first = first_read(
        s_row, t_row, s_class, t_class, k, 0, V, V, THREADS, VECTOR, ALONG, LABELS, STATS
    )
    s_top, t_top, s_inv, t_inv, log_ratio, kl = sums_of(s_peak, s_acc, t_peak, t_acc, cross, k)
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)

    ce, peak, inv_total, label, second_label, first, second = 0.0, 0.0, 0.0, 0, 0, 0.0, 0.0
    if LABELS > 0:
        label, first, logit, second_label, second, second_logit = labels_of(
            label_ptr, factor_ptr, second_label_ptr, second_factor_ptr, label_weight, s_row, s_class,
            row, row < num_rows, counts,
            weight_ptr, upstream_ptr, num_rows, V, LABELS, WEIGHT, UPSTREAM, IGNORE, COUNTED,
        )  # fmt: skip
        total = tl.sum(total_acc * tl.exp2((s_peak - s_max) * 1.4426950408889634), axis=0)
        peak, inv_total = s_max, 1.0 / total
        mean = tl.sum(logit_sum, axis=0) / V
        ce = label_loss(peak + tl.log(total), mean, first, logit, second, second_logit, smoothing)
    if STATS:
        total = tl.sum(total_acc * tl.exp2((t_peak - t_max) * 1.4426950408889634), axis=0)
        s_best = tl.min(tl.where(s_peak == s_max, s_first, V), axis=0)
        t_best = tl.min(tl.where(t_peak == t_max, t_first, V), axis=0)
        tl.store(class_ptr + row, t_best.to(tl.int64))
        tl.store(probability_ptr + row, 1.0 / total)
        tl.store(agreement_ptr + row, s_best == t_best)
    g = tl.where(counts, scale * inv_t, 0.0)
    gs_row, gt_row = s_row, t_row  # where none is wanted: a tuple takes no None
    if GRAD_S:
        gs_row = gradient_row(gs_ptr, outer, within, gs_outer, gs_inner, GRAD_S)
    if GRAD_T:
        gt_row = gradient_row(gt_ptr, outer, within, gt_outer, gt_inner, GRAD_T)
    kl = gradients(
        (s_row, t_row, gs_row, gt_row), (s_class, t_class, gs_class, gt_class), g, counts,
        (s_top, t_top, s_inv, t_inv, log_ratio, k), kl,
        (peak, inv_total, label, second_label, first, second, smoothing), 0,
        V, V, THREADS, VECTOR, ALONG, GRAD_S, GRAD_T, MASK, LABELS, RARE,
    )  # fmt: skip
    loss = tl.where(counts, scale * kl + ce, 0.0)
    store_losses(loss, row, None, rows_ptr, loss_ptr, partial_ptr, counter_ptr, STORE_ROWS, REDUCE, True)
