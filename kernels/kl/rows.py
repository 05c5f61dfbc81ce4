"""Bodies of the KL kernels. Equations, bytes and launch plans stand in the package.

A tile's dimensions are used in one of four ways; the class dimension is what is summed out:

    0  [chunk, row, lane]   classes = chunk·WIDTH + lane
    1  [row, chunk, lane]   the same, in the order that Triton 3.6 compiles well
    2  [class, pixel]       class dimension 1 of [B, C, H, W], vectorised along pixels
    3  [class]              one row a program
"""

import triton
import triton.language as tl

from ..common.reduce import reduce_last
from ..common.rows import gap_of, near_terms, row_factor, scalar, store_gradient
from .labels import label_gradient, label_loss, label_of


@triton.jit
def _over_classes(x, LAYOUT: tl.constexpr, MAX: tl.constexpr):
    """Reduce a tile over its class dimension(s) to one value a row."""
    if LAYOUT == 0:
        out = tl.max(tl.max(x, axis=0), axis=1) if MAX else tl.sum(tl.sum(x, axis=0), axis=1)
    elif LAYOUT == 1:
        out = tl.max(tl.max(x, axis=1), axis=1) if MAX else tl.sum(tl.sum(x, axis=1), axis=1)
    else:
        out = tl.max(x, axis=0) if MAX else tl.sum(x, axis=0)
    return out


@triton.jit
def _per_row(v, LAYOUT: tl.constexpr):
    """Broadcast one value a row over the tile."""
    if LAYOUT == 0:
        out = v[None, :, None]
    elif LAYOUT == 1:
        out = v[:, None, None]
    elif LAYOUT == 2:
        out = v[None, :]
    else:
        out = v
    return out


@triton.jit
def _store_statistics(
    s, t, classes, rows, valid, class_ptr, probability_ptr, agreement_ptr, V: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """The teacher's class (the first of equals), its probability at temperature 1, and whether the student agrees."""
    s_peak, t_peak = _over_classes(s, LAYOUT, True), _over_classes(t, LAYOUT, True)
    # The smallest class of the largest logit, as a maximum: V - class is exact in float32 below 2²⁴.
    rank = (V - classes).to(tl.float32)
    s_rank = _over_classes(tl.where(s == _per_row(s_peak, LAYOUT), rank, 1.0), LAYOUT, True)
    t_rank = _over_classes(tl.where(t == _per_row(t_peak, LAYOUT), rank, 1.0), LAYOUT, True)
    total = _over_classes(tl.exp2((t - _per_row(t_peak, LAYOUT)) * 1.4426950408889634), LAYOUT, False)
    tl.store(class_ptr + rows, V - t_rank.to(tl.int64), mask=valid)
    tl.store(probability_ptr + rows, 1.0 / total, mask=valid)
    tl.store(agreement_ptr + rows, s_rank == t_rank, mask=valid)


@triton.jit
def kd_kl_tile_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr,
    num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, INNER_ONE: tl.constexpr, T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
    label_ptr=None, factor_ptr=None, second_label_ptr=None, second_factor_ptr=None, smoothing=0.0,
    class_ptr=None, probability_ptr=None, agreement_ptr=None,
    LABELS: tl.constexpr = 0, STATS: tl.constexpr = False,
    NEAR: tl.constexpr = True,
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
    s_at = _per_row(outer * s_outer + within * s_inner, LAYOUT) + classes * s_class
    t_at = _per_row(outer * t_outer + within * t_inner, LAYOUT) + classes * t_class
    gs_at = _per_row(outer * gs_outer + within * gs_inner, LAYOUT) + classes * gs_class
    gt_at = _per_row(outer * gt_outer + within * gt_inner, LAYOUT) + classes * gt_class
    live = _per_row(valid, LAYOUT)
    if V < CHUNKS * WIDTH:
        live = live & (classes < V)

    s = tl.load(s_ptr + s_at, mask=live, other=float("-inf")).to(tl.float32)
    t = tl.load(t_ptr + t_at, mask=live, other=float("-inf")).to(tl.float32)
    # Powers of two, so that a scaled logit and its exponential are one instruction each.
    k = inv_t * 1.4426950408889634
    s_top = _over_classes(s, LAYOUT, True) * k
    t_top = _over_classes(t, LAYOUT, True) * k
    q = tl.exp2(s * k - _per_row(s_top, LAYOUT))
    p = tl.exp2(t * k - _per_row(t_top, LAYOUT))
    s_inv = 1.0 / _over_classes(q, LAYOUT, False)
    t_sum = _over_classes(p, LAYOUT, False)
    t_inv = 1.0 / t_sum
    log_ratio = (t_top - s_top) + tl.log2(t_sum * s_inv)
    gap = gap_of(s, t, k, _per_row(log_ratio, LAYOUT))
    kl = _over_classes(p * gap, LAYOUT, False) * (t_inv * 0.6931471805599453)

    ce = 0.0
    if LABELS > 0:
        plain = 1.0
        if UPSTREAM == 1:
            plain = tl.load(upstream_ptr).to(tl.float32)
        weight, _counts = row_factor(
            rows, valid, weight_ptr, mask_ptr, upstream_ptr, plain, WEIGHT, False, UPSTREAM
        )
        s_row = s_ptr + outer * s_outer + within * s_inner
        label, first, logit = label_of(label_ptr, factor_ptr, s_row, s_class, rows, counts, weight, V)
        second_label, second, second_logit = label, first * 0.0, logit
        if LABELS == 2:
            second_label, second, second_logit = label_of(
                second_label_ptr, second_factor_ptr, s_row, s_class, rows, counts, weight, V
            )
        # The softmax at temperature 1, from the same logits.
        peak = _over_classes(s, LAYOUT, True)
        total = _over_classes(tl.exp2((s - _per_row(peak, LAYOUT)) * 1.4426950408889634), LAYOUT, False)
        mean = _over_classes(tl.where(live, s, 0.0), LAYOUT, False) / V
        ce = label_loss(peak + tl.log(total), mean, first, logit, second, second_logit, smoothing)
    if STATS:
        _store_statistics(s, t, classes, rows, valid, class_ptr, probability_ptr, agreement_ptr, V, LAYOUT)
    g = tl.where(counts, scale * inv_t, 0.0)
    keep = _per_row(counts, LAYOUT)  # a row that does not count gets 0, even where its logits are NaN
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
        q = tl.exp2(s * k - _per_row(s_top, LAYOUT)) * _per_row(s_inv, LAYOUT)
        p = tl.exp2(t * k - _per_row(t_top, LAYOUT)) * _per_row(t_inv, LAYOUT)
        gap = gap_of(s, t, k, _per_row(log_ratio, LAYOUT))
        term, difference, delta = near_terms(gap, p, q, t > float("-inf"))
        kl = _over_classes(term, LAYOUT, False)
        if GRAD_S or GRAD_T:
            centre = _over_classes(difference, LAYOUT, False)
        if GRAD_S:
            grad = _per_row(g, LAYOUT) * (difference - _per_row(centre, LAYOUT) * q)
            if LABELS > 0:
                grad += label_gradient(
                    tl.exp2((s - _per_row(peak, LAYOUT)) * 1.4426950408889634) * _per_row(1.0 / total, LAYOUT),
                    classes, _per_row(label, LAYOUT), _per_row(second_label, LAYOUT),
                    _per_row(first, LAYOUT), _per_row(second, LAYOUT), smoothing, V,
                )  # fmt: skip
            store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            grad = _per_row(g, LAYOUT) * p * (delta + _per_row(centre - kl, LAYOUT))
            store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    else:
        if GRAD_S:
            grad = q * _per_row(g * s_inv, LAYOUT) - p * _per_row(g * t_inv, LAYOUT)
            if LABELS > 0:
                grad += label_gradient(
                    tl.exp2((s - _per_row(peak, LAYOUT)) * 1.4426950408889634) * _per_row(1.0 / total, LAYOUT),
                    classes, _per_row(label, LAYOUT), _per_row(second_label, LAYOUT),
                    _per_row(first, LAYOUT), _per_row(second, LAYOUT), smoothing, V,
                )  # fmt: skip
            store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            grad = p * _per_row(g * t_inv, LAYOUT) * (gap * 0.6931471805599453 - _per_row(kl, LAYOUT))
            store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    loss = tl.where(counts, scale * kl + ce, 0.0)
    if STORE_ROWS:
        tl.store(rows_ptr + rows, loss, mask=valid)
    if REDUCE:
        if LAYOUT == 3:
            reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
        else:
            reduce_last(tl.sum(loss, axis=0), loss_ptr, partial_ptr, counter_ptr, 1024)
