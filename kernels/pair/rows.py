"""Bodies of the row losses of two logit tensors: JSD and DKD. Equations and launch plans stand in the package.

Each loss gives, class by class, its term and w = (probability × derivative with respect to it); softmax's
derivative then needs one sum a row: ∂/∂s = (w_s - q·Σw_s)/T and ∂/∂t = (w_t - p·Σw_t)/T. A constant error of
log p - log q (what the two log-sum-exps leave behind) drops out of both.
"""

import triton
import triton.language as tl

from ..common.reduce import reduce_last
from ..common.rows import row_factor, scalar, store_gradient
from ..kl.rows import _over_classes, _per_row
from .terms import binary_terms, clamped_gap, odds, pair_terms, without_target


@triton.jit
def _gradient(
    w, total, prob, scale, divergence_weight, odds_slope, is_target, LAYOUT: tl.constexpr, KIND: tl.constexpr
):
    """∂loss/∂logit of a tile: the softmax's derivative, and for DKD the target class's share."""
    grad = w - prob * _per_row(total, LAYOUT)
    if KIND == 1:
        grad = divergence_weight * grad - prob * _per_row(odds_slope, LAYOUT)
        grad = tl.where(is_target, _per_row(odds_slope, LAYOUT), grad)
    return grad * _per_row(scale, LAYOUT)


@triton.jit
def pair_tile_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, target_ptr, temperature, temperature_ptr, divisor, divisor_ptr, alpha, beta,
    num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, LAYOUT: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, INNER_ONE: tl.constexpr, T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Rows whose class dimension fits in registers: one read of each logit, one write of each gradient."""
    T = scalar(temperature, temperature_ptr, T_PTR)
    factor = T * T / scalar(divisor, divisor_ptr, DIVISOR_PTR)
    if UPSTREAM == 1:
        upstream = tl.load(upstream_ptr).to(tl.float32)
        if EARLY_EXIT:
            if upstream == 1.0:  # the forward launch wrote exactly this gradient
                return
        factor *= upstream
    inv_t = 1.0 / T
    k = inv_t * 1.4426950408889634

    # Which rows, and where they begin.
    pid = tl.program_id(0)
    if LAYOUT == 3:
        rows = pid
        outer, within = rows // inner, rows % inner
        valid = rows < num_rows
        classes = tl.arange(0, CHUNKS)
    elif LAYOUT == 2:
        tiles = tl.cdiv(inner, ROWS)
        outer = pid // tiles
        within = (pid % tiles) * ROWS + tl.arange(0, ROWS)
        rows = outer * inner + within
        valid = within < inner
        classes = tl.cast(tl.arange(0, CHUNKS)[:, None], tl.int64)
    else:
        rows = pid * ROWS + tl.arange(0, ROWS)
        if INNER_ONE:
            outer, within = rows, rows * 0
        else:
            outer, within = rows // inner, rows % inner
        valid = rows < num_rows
        if LAYOUT == 0:
            classes = tl.arange(0, CHUNKS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
        else:
            classes = tl.arange(0, CHUNKS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    scale, counts = row_factor(
        rows, valid, weight_ptr, mask_ptr, upstream_ptr, factor, WEIGHT, MASK, UPSTREAM
    )
    # Outer strides come in units that divide them all: the compiler sees the alignment, and loads stay wide.
    outer = tl.cast(outer, tl.int64) * UNIT
    within = tl.cast(within, tl.int64)
    s_row, t_row = outer * s_outer + within * s_inner, outer * t_outer + within * t_inner
    s_at = _per_row(s_row, LAYOUT) + classes * s_class
    t_at = _per_row(t_row, LAYOUT) + classes * t_class
    live = _per_row(valid, LAYOUT)
    if V < CHUNKS * WIDTH:
        live = live & (classes < V)
    is_target = live
    if KIND == 1:
        target = tl.load(target_ptr + rows, mask=valid, other=0)
        is_target = classes == _per_row(target, LAYOUT)

    s = without_target(tl.load(s_ptr + s_at, mask=live, other=float("-inf")), is_target, KIND)
    t = without_target(tl.load(t_ptr + t_at, mask=live, other=float("-inf")), is_target, KIND)
    s_top = _over_classes(s, LAYOUT, True) * k
    t_top = _over_classes(t, LAYOUT, True) * k
    q = tl.exp2(s * k - _per_row(s_top, LAYOUT))
    p = tl.exp2(t * k - _per_row(t_top, LAYOUT))
    s_sum, t_sum = _over_classes(q, LAYOUT, False), _over_classes(p, LAYOUT, False)
    s_inv, t_inv = 1.0 / s_sum, 1.0 / t_sum
    log_ratio = (t_top - s_top) + tl.log2(t_sum * s_inv)
    q *= _per_row(s_inv, LAYOUT)
    p *= _per_row(t_inv, LAYOUT)
    gap = clamped_gap(s, t, k, _per_row(log_ratio, LAYOUT), KIND)
    term, w_s, w_t = pair_terms(gap, p, q, live, beta, KIND, False)
    divergence = _over_classes(term, LAYOUT, False)

    binary = divergence * 0.0
    s_slope, t_slope = binary, binary
    if KIND == 1:
        binary, s_slope, t_slope = binary_terms(
            odds(s_ptr, tl.where(valid, s_row + target * s_class, 0), k, s_top, s_sum),
            odds(t_ptr, tl.where(valid, t_row + target * t_class, 0), k, t_top, t_sum),
        )
        binary, s_slope, t_slope = alpha * binary, alpha * s_slope, alpha * t_slope

    g = tl.where(counts, scale * inv_t, 0.0)
    keep = _per_row(counts, LAYOUT)  # a row that does not count gets 0, even where its logits are NaN
    gs_at = _per_row(outer * gs_outer + within * gs_inner, LAYOUT) + classes * gs_class
    gt_at = _per_row(outer * gt_outer + within * gt_inner, LAYOUT) + classes * gt_class
    closest = tl.where(counts, divergence, 1.0)
    if LAYOUT != 3:
        closest = tl.min(closest, axis=0)
    if closest < 1e-3:
        # Some row's student and teacher nearly agree, and its digits have cancelled: read the tile again, so
        # that the common branch keeps no registers for this one.
        s = without_target(tl.load(s_ptr + s_at, mask=live, other=float("-inf")), is_target, KIND)
        t = without_target(tl.load(t_ptr + t_at, mask=live, other=float("-inf")), is_target, KIND)
        q = tl.exp2(s * k - _per_row(s_top, LAYOUT)) * _per_row(s_inv, LAYOUT)
        p = tl.exp2(t * k - _per_row(t_top, LAYOUT)) * _per_row(t_inv, LAYOUT)
        gap = clamped_gap(s, t, k, _per_row(log_ratio, LAYOUT), KIND)
        present = (t > float("-inf")) & (s > float("-inf"))
        term, w_s, w_t = pair_terms(gap, p, q, present, beta, KIND, True)
        divergence = _over_classes(term, LAYOUT, False)
        if GRAD_S:
            total = _over_classes(w_s, LAYOUT, False)
            grad = _gradient(w_s, total, q, g, beta, s_slope, is_target, LAYOUT, KIND)
            store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            total = _over_classes(w_t, LAYOUT, False)
            grad = _gradient(w_t, total, p, g, beta, t_slope, is_target, LAYOUT, KIND)
            store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    else:
        if GRAD_S:
            total = _over_classes(w_s, LAYOUT, False)
            grad = _gradient(w_s, total, q, g, beta, s_slope, is_target, LAYOUT, KIND)
            store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            total = _over_classes(w_t, LAYOUT, False)
            grad = _gradient(w_t, total, p, g, beta, t_slope, is_target, LAYOUT, KIND)
            store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    if KIND == 1:
        divergence = binary + beta * divergence
    loss = tl.where(counts, scale * divergence, 0.0)
    if STORE_ROWS:
        tl.store(rows_ptr + rows, loss, mask=valid)
    if REDUCE:
        if LAYOUT == 3:
            reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
        else:
            reduce_last(tl.sum(loss, axis=0), loss_ptr, partial_ptr, counter_ptr, 1024)


@triton.jit
def _walk(
    s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, counts,
    k, s_top, t_top, s_inv, t_inv, log_ratio, beta, s_total, t_total, s_slope, t_slope,
    V: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, NEAR: tl.constexpr,
    STORE_S: tl.constexpr, STORE_T: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Read a row once more: store its gradients, or return its sums (divergence, Σw_s, Σw_t)."""
    sums = tl.zeros([BLOCK], tl.float32)
    s_sums = tl.zeros([BLOCK], tl.float32)
    t_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = without_target(
            tl.load(s_row + classes * s_class, mask=live, other=float("-inf")), classes == target, KIND
        )
        t = without_target(
            tl.load(t_row + classes * t_class, mask=live, other=float("-inf")), classes == target, KIND
        )
        q = tl.exp2(s * k - s_top) * s_inv
        p = tl.exp2(t * k - t_top) * t_inv
        gap = clamped_gap(s, t, k, log_ratio, KIND)
        present = (t > float("-inf")) & (s > float("-inf"))
        term, w_s, w_t = pair_terms(gap, p, q, present, beta, KIND, NEAR)
        if STORE_S or STORE_T:
            is_target = classes == target
            if STORE_S:
                grad = _gradient(w_s, s_total, q, g, beta, s_slope, is_target, 3, KIND)
                store_gradient(gs_row + classes * gs_class, grad, counts, live, MASK)
            if STORE_T:
                grad = _gradient(w_t, t_total, p, g, beta, t_slope, is_target, 3, KIND)
                store_gradient(gt_row + classes * gt_class, grad, counts, live, MASK)
        else:
            sums += term
            s_sums += w_s
            t_sums += w_t
    return tl.sum(sums, axis=0), tl.sum(s_sums, axis=0), tl.sum(t_sums, axis=0)


@triton.jit
def pair_loop_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, target_ptr, temperature, temperature_ptr, divisor, divisor_ptr, alpha, beta,
    num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Rows that do not fit on the chip: log-sum-exps, then the row's sums, then its gradients."""
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
    target = row * 0
    if KIND == 1:
        target = tl.load(target_ptr + row)

    # Online log-sum-exp a lane (Milakov & Gimelshein 2018). A lane's peak starts far below any logit, and
    # finite: -inf - -inf would be NaN.
    s_peak = tl.full([BLOCK], -1e38, tl.float32)
    t_peak = tl.full([BLOCK], -1e38, tl.float32)
    s_acc = tl.zeros([BLOCK], tl.float32)
    t_acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = without_target(
            tl.load(s_row + classes * s_class, mask=live, other=float("-inf")), classes == target, KIND
        )
        t = without_target(
            tl.load(t_row + classes * t_class, mask=live, other=float("-inf")), classes == target, KIND
        )
        s_new, t_new = tl.maximum(s_peak, s), tl.maximum(t_peak, t)
        s_acc = s_acc * tl.exp2((s_peak - s_new) * k) + tl.exp2((s - s_new) * k)
        t_acc = t_acc * tl.exp2((t_peak - t_new) * k) + tl.exp2((t - t_new) * k)
        s_peak, t_peak = s_new, t_new
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    s_top, t_top = s_max * k, t_max * k
    s_sum = tl.sum(s_acc * tl.exp2((s_peak - s_max) * k), axis=0)
    t_sum = tl.sum(t_acc * tl.exp2((t_peak - t_max) * k), axis=0)
    s_inv, t_inv = 1.0 / s_sum, 1.0 / t_sum
    log_ratio = (t_top - s_top) + tl.log2(t_sum * s_inv)

    binary = s_top * 0.0
    s_slope, t_slope = binary, binary
    if KIND == 1:
        binary, s_slope, t_slope = binary_terms(
            odds(s_row, target.to(tl.int64) * s_class, k, s_top, s_sum),
            odds(t_row, target.to(tl.int64) * t_class, k, t_top, t_sum),
        )
        binary, s_slope, t_slope = alpha * binary, alpha * s_slope, alpha * t_slope
    g = tl.where(counts, scale * inv_t, 0.0)
    gs_row, gt_row = gs_ptr, gt_ptr
    if GRAD_S:
        gs_row += outer * gs_outer + within * gs_inner
    if GRAD_T:
        gt_row += outer * gt_outer + within * gt_inner
    divergence, s_total, t_total = _walk(
        s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, counts,
        k, s_top, t_top, s_inv, t_inv, log_ratio, beta, 0.0, 0.0, 0.0, 0.0,
        V, BLOCK, KIND, False, False, False, MASK,
    )  # fmt: skip
    if divergence < 1e-3:
        divergence, s_total, t_total = _walk(
            s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, counts,
            k, s_top, t_top, s_inv, t_inv, log_ratio, beta, 0.0, 0.0, 0.0, 0.0,
            V, BLOCK, KIND, True, False, False, MASK,
        )  # fmt: skip
        if GRAD_S or GRAD_T:
            _walk(
                s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, counts,
                k, s_top, t_top, s_inv, t_inv, log_ratio, beta, s_total, t_total, s_slope, t_slope,
                V, BLOCK, KIND, True, GRAD_S, GRAD_T, MASK,
            )  # fmt: skip
    elif GRAD_S or GRAD_T:
        _walk(
            s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, counts,
            k, s_top, t_top, s_inv, t_inv, log_ratio, beta, s_total, t_total, s_slope, t_slope,
            V, BLOCK, KIND, False, GRAD_S, GRAD_T, MASK,
        )  # fmt: skip
    if KIND == 1:
        divergence = binary + beta * divergence
    loss = tl.where(counts, scale * divergence, 0.0)
    if STORE_ROWS:
        tl.store(rows_ptr + row, loss)
    if REDUCE:
        reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
