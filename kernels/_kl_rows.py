"""Bodies of the KL kernels. Equations, bytes and launch plans stand in losses.py.

A tile's dimensions are used in one of four ways; the class dimension is what is summed out:

    0  [chunk, row, lane]   classes = chunk·WIDTH + lane
    1  [row, chunk, lane]   the same, in the order that Triton 3.6 compiles well
    2  [class, pixel]       class dimension 1 of [B, C, H, W], vectorised along pixels
    3  [class]              one row a program
"""

import triton
import triton.language as tl

from ._kl_common import gap_of, near_terms, reduce_last, row_factor, scalar, store_gradient


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
def kd_kl_tile_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr,
    num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, INNER_ONE: tl.constexpr, T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
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
            store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            grad = _per_row(g, LAYOUT) * p * (delta + _per_row(centre - kl, LAYOUT))
            store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    else:
        if GRAD_S:
            grad = q * _per_row(g * s_inv, LAYOUT) - p * _per_row(g * t_inv, LAYOUT)
            store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            grad = p * _per_row(g * t_inv, LAYOUT) * (gap * 0.6931471805599453 - _per_row(kl, LAYOUT))
            store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    loss = tl.where(counts, scale * kl, 0.0)
    if STORE_ROWS:
        tl.store(rows_ptr + rows, loss, mask=valid)
    if REDUCE:
        if LAYOUT == 3:
            reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
        else:
            reduce_last(tl.sum(loss, axis=0), loss_ptr, partial_ptr, counter_ptr, 1024)
