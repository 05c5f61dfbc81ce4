"""Rows of JSD, DKD and the divergences of divergences.py that do not fit on the chip.

Equations and launch plans stand in the package.
"""

import triton
import triton.language as tl

from ..common.rows import (
    finished,
    gradient_row,
    in_strides,
    no_logits,
    row_scale,
    store_gradient,
)
from ..common.tile import store_losses
from ..common.vectors import block_classes, block_logits, more_of_vector, scaled
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
    pair_gradient,
    pair_terms,
    row_gradient,
)


@triton.jit
def _logits_of(ptrs, classes, target, ratio, V: tl.constexpr, KIND: tl.constexpr, OF_RATIO: tl.constexpr,
               WHOLE: tl.constexpr):  # fmt: skip
    """:func:`block_logits`, for DKD -inf at the target; the teacher's in units of the student's temperature."""
    x = block_logits(ptrs, classes, V, WHOLE)
    if KIND == 1:
        x = tl.where(classes == target, float("-inf"), x)
    if OF_RATIO:
        x *= ratio
    return x


@triton.jit
def _walk_block(
    sums, rows, strides, classes, target, g, g_t, ratio, counts, of_row, alpha, beta, totals, slopes,
    V: tl.constexpr, ALONG: tl.constexpr, KIND: tl.constexpr, RATIO: tl.constexpr, NEAR: tl.constexpr,
    STORE_S: tl.constexpr, STORE_T: tl.constexpr, MASK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One block of :func:`_walk`: its gradients stored, or ``sums`` with it."""
    k, s_max, t_max, s_top, t_top, s_inv, t_inv, log_ratio = of_row
    s = _logits_of(rows[0] + classes * strides[0], classes, target, ratio, V, KIND, False, WHOLE)
    t = _logits_of(rows[1] + classes * strides[1], classes, target, ratio, V, KIND, RATIO, WHOLE)
    q, p = exponential(s, s_max, s_top, k, KIND), exponential(t, t_max, t_top, k, KIND)
    gap = clamped_gap(s, t, k, t_max - s_max, log_ratio, KIND)
    if KIND == 0 and not NEAR:
        w_s, w_t = jsd_terms(gap, p, q, beta)
        term = w_s
    else:
        q *= s_inv
        p *= t_inv
        present = (t > float("-inf")) & (s > float("-inf"))
        log_q = log_probability(s, s_max, s_inv, k, KIND)
        log_p = log_probability(t, t_max, t_inv, k, KIND)
        term, w_s, w_t = pair_terms(gap, p, q, log_p, log_q, present, alpha, beta, KIND, NEAR)
    if STORE_S or STORE_T:
        is_target = classes == target
        live = None if WHOLE else classes < V
        if STORE_S:
            grad = pair_gradient(w_s, totals[0], q, g, beta, slopes[0], is_target, 3, KIND, False)
            store_gradient(rows[2] + classes * strides[2], grad, counts, live, MASK)
        if STORE_T:
            grad = pair_gradient(w_t, totals[1], p, g_t, beta, slopes[1], is_target, 3, KIND, False)
            store_gradient(rows[3] + classes * strides[3], grad, counts, live, MASK)
    return (
        sums[0] + tl.sum(term, axis=ALONG),
        sums[1] + tl.sum(w_s, axis=ALONG),
        sums[2] + tl.sum(w_t, axis=ALONG),
    )


@triton.jit
def _walk(
    rows, strides, target, g, g_t, ratio, counts, of_row, alpha, beta, totals, slopes,
    V: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr, KIND: tl.constexpr,
    RATIO: tl.constexpr, NEAR: tl.constexpr, STORE_S: tl.constexpr, STORE_T: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Read a row once more: store its gradients, or return its sums (divergence, Σw_s, Σw_t).

    Args:
        rows: Where the row begins: student, teacher, and their gradients.
        strides: From class to class, of each.
        of_row: k, the largest logits, the same scaled, 1/Σ, log2 of the ratio of the sums.
        totals: Σw_s, Σw_t.
        slopes: Of DKD's binary part.
    """
    zero = tl.zeros([THREADS], tl.float32)
    sums = (zero, zero, zero)
    BLOCK: tl.constexpr = THREADS * VECTOR
    lanes = block_classes(THREADS, VECTOR, ALONG)
    whole: tl.constexpr = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        sums = _walk_block(
            sums, rows, strides, (start + lanes).to(tl.int64), target, g, g_t, ratio, counts, of_row, alpha, beta,
            totals, slopes, V, ALONG, KIND, RATIO, NEAR, STORE_S, STORE_T, MASK, True,
        )  # fmt: skip
    if whole < V:
        sums = _walk_block(
            sums, rows, strides, (whole + lanes).to(tl.int64), target, g, g_t, ratio, counts, of_row, alpha, beta,
            totals, slopes, V, ALONG, KIND, RATIO, NEAR, STORE_S, STORE_T, MASK, False,
        )  # fmt: skip
    return tl.sum(sums[0], axis=0), tl.sum(sums[1], axis=0), tl.sum(sums[2], axis=0)


@triton.jit
def pair_loop_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    target_ptr, alpha, beta, ratio, ratio_ptr,
    V: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, RATIO: tl.constexpr, RATIO_PTR: tl.constexpr,
    THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr, RARE: tl.constexpr = True, IGNORE: tl.constexpr = None,
    EVEN: tl.constexpr = False,
):  # fmt: skip
    """Rows that do not fit on the chip: log-sum-exps, then the row's sums, then its gradients."""
    if finished(upstream_ptr, EARLY_EXIT):
        return
    SOME: tl.constexpr = MASK or IGNORE is not None  # rows may not count
    if EVEN:  # a constant: the mixture is the same on either side of 0
        beta = 0.5
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
        if IGNORE is not None:
            counts = counts & (target != IGNORE)

    SCALED: tl.constexpr = KIND == 1  # as :func:`exponential` counts
    s_peak, s_acc = no_logits([THREADS])
    t_peak, t_acc = no_logits([THREADS])
    BLOCK: tl.constexpr = THREADS * VECTOR
    lanes = block_classes(THREADS, VECTOR, ALONG)
    whole: tl.constexpr = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        classes = (start + lanes).to(tl.int64)
        s = _logits_of(s_row + classes * s_class, classes, target, ratio, V, KIND, False, True)
        t = _logits_of(t_row + classes * t_class, classes, target, ratio, V, KIND, RATIO, True)
        s_peak, s_acc = more_of_vector(s_peak, s_acc, s, k, ALONG, SCALED)
        t_peak, t_acc = more_of_vector(t_peak, t_acc, t, k, ALONG, SCALED)
    if whole < V:
        classes = (whole + lanes).to(tl.int64)
        s = _logits_of(s_row + classes * s_class, classes, target, ratio, V, KIND, False, False)
        t = _logits_of(t_row + classes * t_class, classes, target, ratio, V, KIND, RATIO, False)
        s_peak, s_acc = more_of_vector(s_peak, s_acc, s, k, ALONG, SCALED)
        t_peak, t_acc = more_of_vector(t_peak, t_acc, t, k, ALONG, SCALED)
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    s_top, t_top = s_max * k, t_max * k
    if SCALED:
        s_top, t_top = scaled(s_max, k), scaled(t_max, k)
        s_part, t_part = tl.exp2(scaled(s_peak, k) - s_top), tl.exp2(scaled(t_peak, k) - t_top)
    else:
        s_part, t_part = tl.exp2((s_peak - s_max) * k), tl.exp2((t_peak - t_max) * k)
    s_sum, t_sum = tl.sum(s_acc * s_part, axis=0), tl.sum(t_acc * t_part, axis=0)
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
    gs_row, gt_row = s_row, t_row  # where none is wanted: a tuple takes no None
    if GRAD_S:
        gs_row = gradient_row(gs_ptr, outer, within, gs_outer, gs_inner, GRAD_S)
    if GRAD_T:
        gt_row = gradient_row(gt_ptr, outer, within, gt_outer, gt_inner, GRAD_T)
    walked = (s_row, t_row, gs_row, gt_row)
    strides = (s_class, t_class, gs_class, gt_class)
    of_row = (k, s_max, t_max, s_top, t_top, s_inv, t_inv, log_ratio)
    none = (0.0, 0.0)
    divergence, s_total, t_total = _walk(
        walked, strides, target, g, g_t, ratio, counts, of_row, alpha, beta, none, none,
        V, THREADS, VECTOR, ALONG, KIND, RATIO, False, False, False, SOME,
    )  # fmt: skip
    g_s = g
    g_both = g_t
    if KIND == 0:  # the probabilities' factors follow once a row
        q_factor, p_factor = jsd_factors(beta)
        q_factor, p_factor = q_factor * s_inv, p_factor * t_inv
        divergence = q_factor * s_total + p_factor * t_total
        s_total, t_total, g_s, g_both = s_total * s_inv, t_total * t_inv, g * q_factor, g_t * p_factor
    nearly = False
    if RARE:  # False: a variant to count instructions of, which is never launched
        nearly = divergence < near_bound(KIND)
    if nearly:
        divergence, s_total, t_total = _walk(
            walked, strides, target, g, g_t, ratio, counts, of_row, alpha, beta, none, none,
            V, THREADS, VECTOR, ALONG, KIND, RATIO, True, False, False, SOME,
        )  # fmt: skip
        if GRAD_S or GRAD_T:
            _walk(
                walked, strides, target, g, g_t, ratio, counts, of_row, alpha, beta, (s_total, t_total),
                (s_slope, t_slope), V, THREADS, VECTOR, ALONG, KIND, RATIO, True, GRAD_S, GRAD_T, SOME,
            )  # fmt: skip
    elif GRAD_S or GRAD_T:
        _walk(
            walked, strides, target, g_s, g_both, ratio, counts, of_row, alpha, beta, (s_total, t_total),
            (s_slope, t_slope), V, THREADS, VECTOR, ALONG, KIND, RATIO, False, GRAD_S, GRAD_T, SOME,
        )  # fmt: skip
    if KIND == 1:
        divergence = binary + beta * divergence
    loss = tl.where(counts, scale * divergence, 0.0)
    store_losses(loss, row, None, rows_ptr, loss_ptr, partial_ptr, counter_ptr, STORE_ROWS, REDUCE, True)
