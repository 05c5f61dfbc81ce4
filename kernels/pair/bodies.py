"""Bodies of the row losses of two logit tensors: JSD, DKD, the divergences of divergences.py.

Equations and launch plans stand in the package.

Each loss gives, class by class, its term and w = (probability × derivative with respect to it); softmax's
derivative then needs one sum a row: ∂/∂s = (w_s - q·Σw_s)/T and ∂/∂t = (w_t - p·Σw_t)/T. A constant error of
log p - log q (what the two log-sum-exps leave behind) drops out of both.
"""

import triton
import triton.language as tl

from ..common.rows import (
    finished,
    gradient_row,
    in_strides,
    more_logits_of_two,
    no_logits,
    row_scale,
    store_gradient,
)
from ..common.tile import over_classes, per_row, store_losses, tile_at, tile_rows
from .terms import (
    binary_terms,
    clamped_gap,
    exponential,
    log_ratio_of,
    odds,
    others,
    pair_terms,
    row_gradient,
    teachers,
)


@triton.jit
def _gradient(
    w, total, prob, scale, divergence_weight, odds_slope, is_target, LAYOUT: tl.constexpr, KIND: tl.constexpr
):
    """∂loss/∂logit of a tile: the softmax's derivative, and for DKD the target class's share."""
    grad = w - prob * per_row(total, LAYOUT)
    if KIND == 1:
        grad = divergence_weight * grad - prob * per_row(odds_slope, LAYOUT)
        grad = tl.where(is_target, per_row(odds_slope, LAYOUT), grad)
    return grad * per_row(scale, LAYOUT)


@triton.jit
def _store_tile(ptr, at, w, prob, g, beta, slope, is_target, keep, live,
                LAYOUT: tl.constexpr, KIND: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """A tile's gradient, which needs the sum of its w."""
    grad = _gradient(w, over_classes(w, LAYOUT, False), prob, g, beta, slope, is_target, LAYOUT, KIND)
    store_gradient(ptr + at, grad, keep, live, MASK)


@triton.jit
def pair_tile_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    target_ptr, alpha, beta, ratio, ratio_ptr,
    V: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, RATIO: tl.constexpr, RATIO_PTR: tl.constexpr,
    LAYOUT: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, INNER_ONE: tl.constexpr, T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Rows whose class dimension fits in registers: one read of each logit, one write of each gradient."""
    if finished(upstream_ptr, EARLY_EXIT):
        return

    rows, valid, outer, within, classes = tile_rows(num_rows, inner, LAYOUT, CHUNKS, ROWS, WIDTH, INNER_ONE)
    scale, counts, inv_t, k = row_scale(
        rows, valid, temperature, temperature_ptr, divisor, divisor_ptr, weight_ptr, mask_ptr, upstream_ptr,
        T_PTR, DIVISOR_PTR, WEIGHT, MASK, UPSTREAM,
    )  # fmt: skip
    if RATIO_PTR:
        ratio = tl.load(ratio_ptr).to(tl.float32)
    outer, within = in_strides(outer, within, UNIT)
    s_row, t_row = outer * s_outer + within * s_inner, outer * t_outer + within * t_inner
    s_at = tile_at(outer, within, classes, s_outer, s_inner, s_class, LAYOUT)
    t_at = tile_at(outer, within, classes, t_outer, t_inner, t_class, LAYOUT)
    live = per_row(valid, LAYOUT)
    if V < CHUNKS * WIDTH:
        live = live & (classes < V)
    is_target = live
    if KIND == 1:
        target = tl.load(target_ptr + rows, mask=valid, other=0)
        is_target = classes == per_row(target, LAYOUT)

    s = others(s_ptr + s_at, live, is_target, KIND)
    t = teachers(t_ptr + t_at, live, is_target, ratio, KIND, RATIO)
    s_max, t_max = over_classes(s, LAYOUT, True), over_classes(t, LAYOUT, True)
    s_top, t_top, shift = s_max * k, t_max * k, t_max - s_max
    q = exponential(s, per_row(s_max, LAYOUT), per_row(s_top, LAYOUT), k, KIND)
    p = exponential(t, per_row(t_max, LAYOUT), per_row(t_top, LAYOUT), k, KIND)
    s_sum, t_sum = over_classes(q, LAYOUT, False), over_classes(p, LAYOUT, False)
    s_inv, t_inv = 1.0 / s_sum, 1.0 / t_sum
    log_ratio = log_ratio_of(s_top, t_top, s_inv, t_sum, KIND)
    q *= per_row(s_inv, LAYOUT)
    p *= per_row(t_inv, LAYOUT)
    gap = clamped_gap(s, t, k, per_row(shift, LAYOUT), per_row(log_ratio, LAYOUT), KIND)
    term, w_s, w_t = pair_terms(gap, p, q, live, beta, KIND, False)
    divergence = over_classes(term, LAYOUT, False)

    binary = divergence * 0.0
    s_slope, t_slope = binary, binary
    if KIND == 1:
        known = valid & (target >= 0) & (target < V)
        binary, s_slope, t_slope = binary_terms(
            odds(s_ptr, s_row + target * s_class, known, k, s_top, s_sum),
            odds(t_ptr, t_row + target * t_class, known, k, t_top, t_sum),
        )
        binary, s_slope, t_slope = alpha * binary, alpha * s_slope, alpha * t_slope

    g = row_gradient(counts, scale, inv_t, log_ratio)
    g_t = g * ratio if RATIO else g
    keep = per_row(counts, LAYOUT)  # a row that does not count gets 0, even where its logits are NaN
    gs_at = tile_at(outer, within, classes, gs_outer, gs_inner, gs_class, LAYOUT)
    gt_at = tile_at(outer, within, classes, gt_outer, gt_inner, gt_class, LAYOUT)
    closest = tl.where(counts, divergence, 1.0)
    if LAYOUT != 3:
        closest = tl.min(closest, axis=0)
    if closest < (0.03 if KIND == 7 else 1e-3):  # an absolute difference cancels earlier than a squared one
        # Some row's student and teacher nearly agree, and its digits have cancelled: read the tile again, so
        # that the common branch keeps no registers for this one.
        s = others(s_ptr + s_at, live, is_target, KIND)
        t = teachers(t_ptr + t_at, live, is_target, ratio, KIND, RATIO)
        q = exponential(s, per_row(s_max, LAYOUT), per_row(s_top, LAYOUT), k, KIND) * per_row(s_inv, LAYOUT)
        p = exponential(t, per_row(t_max, LAYOUT), per_row(t_top, LAYOUT), k, KIND) * per_row(t_inv, LAYOUT)
        gap = clamped_gap(s, t, k, per_row(shift, LAYOUT), per_row(log_ratio, LAYOUT), KIND)
        present = (t > float("-inf")) & (s > float("-inf"))
        term, w_s, w_t = pair_terms(gap, p, q, present, beta, KIND, True)
        divergence = over_classes(term, LAYOUT, False)
        if GRAD_S:
            _store_tile(gs_ptr, gs_at, w_s, q, g, beta, s_slope, is_target, keep, live, LAYOUT, KIND, MASK)
        if GRAD_T:
            _store_tile(gt_ptr, gt_at, w_t, p, g_t, beta, t_slope, is_target, keep, live, LAYOUT, KIND, MASK)
    else:
        if GRAD_S:
            _store_tile(gs_ptr, gs_at, w_s, q, g, beta, s_slope, is_target, keep, live, LAYOUT, KIND, MASK)
        if GRAD_T:
            _store_tile(gt_ptr, gt_at, w_t, p, g_t, beta, t_slope, is_target, keep, live, LAYOUT, KIND, MASK)
    if KIND == 1:
        divergence = binary + beta * divergence
    loss = tl.where(counts, scale * divergence, 0.0)
    store_losses(
        loss, rows, valid, rows_ptr, loss_ptr, partial_ptr, counter_ptr, STORE_ROWS, REDUCE, LAYOUT == 3
    )


@triton.jit
def _walk(
    s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, g_t, ratio, counts,
    k, s_max, t_max, s_top, t_top, s_inv, t_inv, log_ratio, beta, s_total, t_total, s_slope, t_slope,
    V: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, RATIO: tl.constexpr, NEAR: tl.constexpr,
    STORE_S: tl.constexpr, STORE_T: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Read a row once more: store its gradients, or return its sums (divergence, Σw_s, Σw_t)."""
    sums = tl.zeros([BLOCK], tl.float32)
    s_sums = tl.zeros([BLOCK], tl.float32)
    t_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = others(s_row + classes * s_class, live, classes == target, KIND)
        t = teachers(t_row + classes * t_class, live, classes == target, ratio, KIND, RATIO)
        q = exponential(s, s_max, s_top, k, KIND) * s_inv
        p = exponential(t, t_max, t_top, k, KIND) * t_inv
        gap = clamped_gap(s, t, k, t_max - s_max, log_ratio, KIND)
        present = (t > float("-inf")) & (s > float("-inf"))
        term, w_s, w_t = pair_terms(gap, p, q, present, beta, KIND, NEAR)
        if STORE_S or STORE_T:
            is_target = classes == target
            if STORE_S:
                grad = _gradient(w_s, s_total, q, g, beta, s_slope, is_target, 3, KIND)
                store_gradient(gs_row + classes * gs_class, grad, counts, live, MASK)
            if STORE_T:
                grad = _gradient(w_t, t_total, p, g_t, beta, t_slope, is_target, 3, KIND)
                store_gradient(gt_row + classes * gt_class, grad, counts, live, MASK)
        else:
            sums += term
            s_sums += w_s
            t_sums += w_t
    return tl.sum(sums, axis=0), tl.sum(s_sums, axis=0), tl.sum(t_sums, axis=0)


@triton.jit
def pair_loop_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    target_ptr, alpha, beta, ratio, ratio_ptr,
    V: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, RATIO: tl.constexpr, RATIO_PTR: tl.constexpr,
    BLOCK: tl.constexpr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Rows that do not fit on the chip: log-sum-exps, then the row's sums, then its gradients."""
    if finished(upstream_ptr, EARLY_EXIT):
        return
    row = tl.program_id(0)
    outer, within = in_strides(row // inner, row % inner, UNIT)
    scale, counts, inv_t, k = row_scale(
        row, row < num_rows, temperature, temperature_ptr, divisor, divisor_ptr, weight_ptr, mask_ptr, upstream_ptr,
        T_PTR, DIVISOR_PTR, WEIGHT, MASK, UPSTREAM,
    )  # fmt: skip
    if RATIO_PTR:
        ratio = tl.load(ratio_ptr).to(tl.float32)
    s_row = s_ptr + outer * s_outer + within * s_inner
    t_row = t_ptr + outer * t_outer + within * t_inner
    target = row * 0
    if KIND == 1:
        target = tl.load(target_ptr + row)

    s_peak, s_acc = no_logits([BLOCK])
    t_peak, t_acc = no_logits([BLOCK])
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = others(s_row + classes * s_class, live, classes == target, KIND)
        t = teachers(t_row + classes * t_class, live, classes == target, ratio, KIND, RATIO)
        s_peak, t_peak, s_acc, t_acc = more_logits_of_two(s_peak, t_peak, s_acc, t_acc, s, t, k)
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    s_top, t_top = s_max * k, t_max * k
    s_sum = tl.sum(s_acc * tl.exp2((s_peak - s_max) * k), axis=0)
    t_sum = tl.sum(t_acc * tl.exp2((t_peak - t_max) * k), axis=0)
    s_inv, t_inv = 1.0 / s_sum, 1.0 / t_sum
    log_ratio = log_ratio_of(s_top, t_top, s_inv, t_sum, KIND)

    binary = s_top * 0.0
    s_slope, t_slope = binary, binary
    if KIND == 1:
        known = (target >= 0) & (target < V)
        binary, s_slope, t_slope = binary_terms(
            odds(s_row, target.to(tl.int64) * s_class, known, k, s_top, s_sum),
            odds(t_row, target.to(tl.int64) * t_class, known, k, t_top, t_sum),
        )
        binary, s_slope, t_slope = alpha * binary, alpha * s_slope, alpha * t_slope
    g = row_gradient(counts, scale, inv_t, log_ratio)
    g_t = g * ratio if RATIO else g
    gs_row = gradient_row(gs_ptr, outer, within, gs_outer, gs_inner, GRAD_S)
    gt_row = gradient_row(gt_ptr, outer, within, gt_outer, gt_inner, GRAD_T)
    divergence, s_total, t_total = _walk(
        s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, g_t, ratio, counts,
        k, s_max, t_max, s_top, t_top, s_inv, t_inv, log_ratio, beta, 0.0, 0.0, 0.0, 0.0,
        V, BLOCK, KIND, RATIO, False, False, False, MASK,
    )  # fmt: skip
    if divergence < (0.03 if KIND == 7 else 1e-3):
        divergence, s_total, t_total = _walk(
            s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, g_t, ratio, counts,
            k, s_max, t_max, s_top, t_top, s_inv, t_inv, log_ratio, beta, 0.0, 0.0, 0.0, 0.0,
            V, BLOCK, KIND, RATIO, True, False, False, MASK,
        )  # fmt: skip
        if GRAD_S or GRAD_T:
            _walk(
                s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, g_t, ratio, counts,
                k, s_max, t_max, s_top, t_top, s_inv, t_inv, log_ratio, beta, s_total, t_total, s_slope, t_slope,
                V, BLOCK, KIND, RATIO, True, GRAD_S, GRAD_T, MASK,
            )  # fmt: skip
    elif GRAD_S or GRAD_T:
        _walk(
            s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, g_t, ratio, counts,
            k, s_max, t_max, s_top, t_top, s_inv, t_inv, log_ratio, beta, s_total, t_total, s_slope, t_slope,
            V, BLOCK, KIND, RATIO, False, GRAD_S, GRAD_T, MASK,
        )  # fmt: skip
    if KIND == 1:
        divergence = binary + beta * divergence
    loss = tl.where(counts, scale * divergence, 0.0)
    store_losses(loss, row, None, rows_ptr, loss_ptr, partial_ptr, counter_ptr, STORE_ROWS, REDUCE, True)
