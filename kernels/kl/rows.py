"""Rows in registers, as tiles (common/tile.py). Equations, bytes and launch plans stand in the package."""

import triton
import triton.language as tl

from ..common.rows import finished, gap_of, in_strides, near_terms, row_scale, store_gradient
from ..common.tile import over_classes, per_row, store_losses, tile_at, tile_rows
from .labels import label_gradient, label_loss, labels_of


@triton.jit
def _store_statistics(
    s, t, classes, rows, valid, class_ptr, probability_ptr, agreement_ptr, V: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """The teacher's class (the first of equals), its probability at temperature 1, and whether the student agrees."""
    s_peak, t_peak = over_classes(s, LAYOUT, True), over_classes(t, LAYOUT, True)
    # The smallest class of the largest logit, as a maximum: V - class is exact in float32 below 2²⁴.
    rank = (V - classes).to(tl.float32)
    s_rank = over_classes(tl.where(s == per_row(s_peak, LAYOUT), rank, 1.0), LAYOUT, True)
    t_rank = over_classes(tl.where(t == per_row(t_peak, LAYOUT), rank, 1.0), LAYOUT, True)
    total = over_classes(tl.exp2((t - per_row(t_peak, LAYOUT)) * 1.4426950408889634), LAYOUT, False)
    tl.store(class_ptr + rows, V - t_rank.to(tl.int64), mask=valid)
    tl.store(probability_ptr + rows, 1.0 / total, mask=valid)
    tl.store(agreement_ptr + rows, s_rank == t_rank, mask=valid)


@triton.jit
def _label_gradient(
    s, peak, total, classes, label, second_label, first, second, smoothing, V: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """∂CE/∂z of a tile, from the rows' values."""
    return label_gradient(
        tl.exp2((s - per_row(peak, LAYOUT)) * 1.4426950408889634) * per_row(1.0 / total, LAYOUT),
        classes, per_row(label, LAYOUT), per_row(second_label, LAYOUT),
        per_row(first, LAYOUT), per_row(second, LAYOUT), smoothing, V,
    )  # fmt: skip


@triton.jit
def kd_kl_tile_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, INNER_ONE: tl.constexpr, T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
    label_ptr=None, factor_ptr=None, second_label_ptr=None, second_factor_ptr=None, smoothing=0.0, label_weight=0.0,
    class_ptr=None, probability_ptr=None, agreement_ptr=None,
    LABELS: tl.constexpr = 0, IGNORE: tl.constexpr = None, COUNTED: tl.constexpr = 0,
    STATS: tl.constexpr = False, NEAR: tl.constexpr = True,
):  # fmt: skip
    """Rows whose class dimension fits in registers: one read of each logit, one write of each gradient."""
    if finished(upstream_ptr, EARLY_EXIT):
        return

    rows, valid, outer, within, classes = tile_rows(num_rows, inner, LAYOUT, CHUNKS, ROWS, WIDTH, INNER_ONE)
    scale, counts, inv_t, k = row_scale(
        rows, valid, temperature, temperature_ptr, divisor, divisor_ptr, weight_ptr, mask_ptr, upstream_ptr,
        T_PTR, DIVISOR_PTR, WEIGHT, MASK, UPSTREAM,
    )  # fmt: skip
    outer, within = in_strides(outer, within, UNIT)
    s_at = tile_at(outer, within, classes, s_outer, s_inner, s_class, LAYOUT)
    t_at = tile_at(outer, within, classes, t_outer, t_inner, t_class, LAYOUT)
    gs_at = tile_at(outer, within, classes, gs_outer, gs_inner, gs_class, LAYOUT)
    gt_at = tile_at(outer, within, classes, gt_outer, gt_inner, gt_class, LAYOUT)
    live = per_row(valid, LAYOUT)
    if V < CHUNKS * WIDTH:
        live = live & (classes < V)

    s = tl.load(s_ptr + s_at, mask=live, other=float("-inf")).to(tl.float32)
    t = tl.load(t_ptr + t_at, mask=live, other=float("-inf")).to(tl.float32)
    s_top = over_classes(s, LAYOUT, True) * k
    t_top = over_classes(t, LAYOUT, True) * k
    q = tl.exp2(s * k - per_row(s_top, LAYOUT))
    p = tl.exp2(t * k - per_row(t_top, LAYOUT))
    s_inv = 1.0 / over_classes(q, LAYOUT, False)
    t_sum = over_classes(p, LAYOUT, False)
    t_inv = 1.0 / t_sum
    log_ratio = (t_top - s_top) + tl.log2(t_sum * s_inv)
    gap = gap_of(s, t, k, per_row(log_ratio, LAYOUT))
    kl = over_classes(p * gap, LAYOUT, False) * (t_inv * 0.6931471805599453)

    ce = 0.0
    if LABELS > 0:
        s_row = s_ptr + outer * s_outer + within * s_inner
        label, first, logit, second_label, second, second_logit = labels_of(
            label_ptr, factor_ptr, second_label_ptr, second_factor_ptr, label_weight, s_row, s_class,
            rows, valid, counts,
            weight_ptr, upstream_ptr, num_rows, V, LABELS, WEIGHT, UPSTREAM, IGNORE, COUNTED,
        )  # fmt: skip
        # The softmax at temperature 1, from the same logits.
        peak = over_classes(s, LAYOUT, True)
        total = over_classes(tl.exp2((s - per_row(peak, LAYOUT)) * 1.4426950408889634), LAYOUT, False)
        mean = over_classes(tl.where(live, s, 0.0), LAYOUT, False) / V
        ce = label_loss(peak + tl.log(total), mean, first, logit, second, second_logit, smoothing)
    if STATS:
        _store_statistics(s, t, classes, rows, valid, class_ptr, probability_ptr, agreement_ptr, V, LAYOUT)
    g = tl.where(counts, scale * inv_t, 0.0)
    keep = per_row(counts, LAYOUT)  # a row that does not count gets 0, even where its logits are NaN
    closest = 1.0
    if NEAR:
        closest = tl.where(counts, kl, 1.0)
        if LAYOUT != 3:
            closest = tl.min(closest, axis=0)
    if closest < 1e-3:
        # Some row's student and teacher nearly agree, and its digits have cancelled. Reading the tile again
        # keeps the other branch, the common one, free of registers that live across.
        s = tl.load(s_ptr + s_at, mask=live, other=float("-inf")).to(tl.float32)
        t = tl.load(t_ptr + t_at, mask=live, other=float("-inf")).to(tl.float32)
        q = tl.exp2(s * k - per_row(s_top, LAYOUT)) * per_row(s_inv, LAYOUT)
        p = tl.exp2(t * k - per_row(t_top, LAYOUT)) * per_row(t_inv, LAYOUT)
        gap = gap_of(s, t, k, per_row(log_ratio, LAYOUT))
        term, difference, delta = near_terms(gap, p, q, t > float("-inf"))
        kl = over_classes(term, LAYOUT, False)
        if GRAD_S or GRAD_T:
            centre = over_classes(difference, LAYOUT, False)
        if GRAD_S:
            grad = per_row(g, LAYOUT) * (difference - per_row(centre, LAYOUT) * q)
            if LABELS > 0:
                grad += _label_gradient(
                    s, peak, total, classes, label, second_label, first, second, smoothing, V, LAYOUT
                )
            store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            grad = per_row(g, LAYOUT) * p * (delta + per_row(centre - kl, LAYOUT))
            store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    else:
        if GRAD_S:
            grad = q * per_row(g * s_inv, LAYOUT) - p * per_row(g * t_inv, LAYOUT)
            if LABELS > 0:
                grad += _label_gradient(
                    s, peak, total, classes, label, second_label, first, second, smoothing, V, LAYOUT
                )
            store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            grad = p * per_row(g * t_inv, LAYOUT) * (gap * 0.6931471805599453 - per_row(kl, LAYOUT))
            store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    loss = tl.where(counts, scale * kl + ce, 0.0)
    store_losses(
        loss, rows, valid, rows_ptr, loss_ptr, partial_ptr, counter_ptr, STORE_ROWS, REDUCE, LAYOUT == 3
    )
