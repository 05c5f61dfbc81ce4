"""Rows of JSD, DKD and the divergences of divergences.py that stay in registers. Equations and plans: the package."""

import triton
import triton.language as tl

from ..common.rows import finished, in_strides, row_scale, store_gradient
from ..common.tile import over_classes, per_row, store_losses, tile_at, tile_rows
from .terms import (
    binary_terms,
    clamped_gap,
    exponential,
    jsd_factors,
    jsd_terms,
    log_probability,
    log_ratio_of,
    near_bound,
    odds,
    others,
    pair_gradient,
    pair_terms,
    row_gradient,
    teachers,
)


@triton.jit
def _store_tile(ptr, at, w, prob, inv, g, beta, slope, is_target, keep, live,
                LAYOUT: tl.constexpr, KIND: tl.constexpr, MASK: tl.constexpr, APART: tl.constexpr):  # fmt: skip
    """A tile's gradient, which needs the sum of its w; ``inv · prob`` is the probability."""
    total = over_classes(w, LAYOUT, False) * inv
    grad = pair_gradient(w, total, prob, g, beta, slope, is_target, LAYOUT, KIND, APART)
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
    RARE: tl.constexpr = True, IGNORE: tl.constexpr = None,
    EVEN: tl.constexpr = False,
):  # fmt: skip
    """Rows whose class dimension fits in registers: one read of each logit, one write of each gradient."""
    if finished(upstream_ptr, EARLY_EXIT):
        return
    SOME: tl.constexpr = MASK or IGNORE is not None  # rows may not count
    # The target's gradients are stored over what the tile has there: a choice class by class costs 2 to 8 instructions
    # an element and keeps a mask from the load to the end. Not of short rows, nor of pixels, which lie far apart.
    APART: tl.constexpr = KIND == 1 and LAYOUT != 2 and V >= 64
    if EVEN:  # a constant: the mixture is the same on either side of 0
        beta = 0.5

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
        if IGNORE is not None:
            counts = counts & (target != IGNORE)
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
    sum_ratio = tl.log2(t_sum * s_inv)
    between = t_top - s_top if KIND == 1 else log_ratio
    gap = clamped_gap(s, t, k, per_row(shift, LAYOUT), per_row(between, LAYOUT), KIND)
    w_s, w_t = q, p
    if KIND == 1:
        # As in kernels/kl: sums before anything is normalised, and two exponentials for the gradient.
        divergence = (over_classes(p * gap, LAYOUT, False) * t_inv - sum_ratio) * 0.6931471805599453
        q_factor, p_factor, s_one, t_one = 1.0, 1.0, s_inv, t_inv
    elif KIND == 0:
        # The probabilities' factors follow once a row.
        q_factor, p_factor = jsd_factors(beta)
        q_factor, p_factor = q_factor * s_inv, p_factor * t_inv
        w_s, w_t = jsd_terms(gap, p, q, beta)
        divergence = q_factor * over_classes(w_s, LAYOUT, False) + p_factor * over_classes(w_t, LAYOUT, False)
        s_one, t_one = s_inv, t_inv
    else:
        q_factor, p_factor, s_one, t_one = 1.0, 1.0, 1.0, 1.0
        q *= per_row(s_inv, LAYOUT)
        p *= per_row(t_inv, LAYOUT)
        log_q = log_probability(s, per_row(s_max, LAYOUT), per_row(s_inv, LAYOUT), k, KIND)
        log_p = log_probability(t, per_row(t_max, LAYOUT), per_row(t_inv, LAYOUT), k, KIND)
        term, w_s, w_t = pair_terms(gap, p, q, log_p, log_q, live, alpha, beta, KIND, False)
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
    g_q, g_p = g * q_factor, g_t * p_factor
    keep = per_row(counts, LAYOUT)  # a row that does not count gets 0, even where its logits are NaN
    gs_at = tile_at(outer, within, classes, gs_outer, gs_inner, gs_class, LAYOUT)
    gt_at = tile_at(outer, within, classes, gt_outer, gt_inner, gt_class, LAYOUT)
    nearly = False
    if RARE and KIND != 10:  # the AB-divergence's registers; RARE is False where instructions are counted
        closest = tl.where(counts, divergence, 1.0)
        if LAYOUT != 3:
            closest = tl.min(closest, axis=0)
        nearly = closest < near_bound(KIND)
    if nearly:
        # Some row's student and teacher nearly agree, and its digits have cancelled: read the tile again, so
        # that the common branch keeps no registers for this one.
        s = others(s_ptr + s_at, live, is_target, KIND)
        t = teachers(t_ptr + t_at, live, is_target, ratio, KIND, RATIO)
        q = exponential(s, per_row(s_max, LAYOUT), per_row(s_top, LAYOUT), k, KIND) * per_row(s_inv, LAYOUT)
        p = exponential(t, per_row(t_max, LAYOUT), per_row(t_top, LAYOUT), k, KIND) * per_row(t_inv, LAYOUT)
        gap = clamped_gap(s, t, k, per_row(shift, LAYOUT), per_row(log_ratio, LAYOUT), KIND)
        present = (t > float("-inf")) & (s > float("-inf"))
        log_q = log_probability(s, per_row(s_max, LAYOUT), per_row(s_inv, LAYOUT), k, KIND)
        log_p = log_probability(t, per_row(t_max, LAYOUT), per_row(t_inv, LAYOUT), k, KIND)
        term, w_s, w_t = pair_terms(gap, p, q, log_p, log_q, present, alpha, beta, KIND, True)
        divergence = over_classes(term, LAYOUT, False)
        if GRAD_S:
            _store_tile(
                gs_ptr, gs_at, w_s, q, 1.0, g, beta, s_slope, is_target, keep, live, LAYOUT, KIND, SOME, APART,
            )  # fmt: skip
        if GRAD_T:
            _store_tile(
                gt_ptr, gt_at, w_t, p, 1.0, g_t, beta, t_slope, is_target, keep, live, LAYOUT, KIND, SOME, APART,
            )  # fmt: skip
    elif KIND == 1:
        if GRAD_S:
            grad = q * per_row(g * (beta - s_slope) * s_inv, LAYOUT) - p * per_row(g * beta * t_inv, LAYOUT)
            if not APART:
                grad = tl.where(is_target, per_row(g * s_slope, LAYOUT), grad)
            store_gradient(gs_ptr + gs_at, grad, keep, live, SOME)
        if GRAD_T:
            delta = (gap - per_row(sum_ratio, LAYOUT)) * 0.6931471805599453
            slope = beta * (delta - per_row(divergence, LAYOUT)) - per_row(t_slope, LAYOUT)
            grad = p * per_row(g_t * t_inv, LAYOUT) * slope
            if not APART:
                grad = tl.where(is_target, per_row(g_t * t_slope, LAYOUT), grad)
            store_gradient(gt_ptr + gt_at, grad, keep, live, SOME)
    else:
        if GRAD_S:
            _store_tile(
                gs_ptr, gs_at, w_s, q, s_one, g_q, beta, s_slope, is_target, keep, live, LAYOUT, KIND, SOME, APART,
            )  # fmt: skip
        if GRAD_T:
            _store_tile(
                gt_ptr, gt_at, w_t, p, t_one, g_p, beta, t_slope, is_target, keep, live, LAYOUT, KIND, SOME, APART,
            )  # fmt: skip
    if APART:
        tl.debug_barrier()  # behind what the tile stored there
        at = outer * gs_outer + within * gs_inner + target * gs_class
        if GRAD_S:
            store_gradient(gs_ptr + at, g * s_slope, counts, known, SOME)
        at = outer * gt_outer + within * gt_inner + target * gt_class
        if GRAD_T:
            store_gradient(gt_ptr + at, g_t * t_slope, counts, known, SOME)
    if KIND == 1:
        divergence = binary + beta * divergence
    loss = tl.where(counts, scale * divergence, 0.0)
    store_losses(
        loss, rows, valid, rows_ptr, loss_ptr, partial_ptr, counter_ptr, STORE_ROWS, REDUCE, LAYOUT == 3
    )
