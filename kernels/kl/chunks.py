"""Rows as tuples of [row, lane] chunks: nothing is padded to a power of two, and rows may begin anywhere.

Where V·itemsize is no multiple of 16 bytes (WINDOW > 0), a row is read from the 16 bytes before its first class,
by whole 16-byte groups. A group at either end also holds a neighbour's classes: those are blotted out, and the two
groups' gradients are written class by class. The last row's last group would reach past the tensor, and is read class
by class. Equations, bytes and launch plans stand in the package.
"""

import triton
import triton.language as tl

from ..common.rows import finished, gap_of, near_terms, row_scale, store_gradient, unnormalised
from ..common.tile import store_losses


@triton.jit
def _chunk(
    s_at, t_at, c: tl.constexpr, lane, shift, wide, V: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr
):
    """One chunk of student and teacher, -inf where it holds no class of this row; groups may be read up to ``wide``."""
    first: tl.constexpr = c * WIDTH
    group = first + (lane // WINDOW * WINDOW if WINDOW > 0 else lane)
    if first + WIDTH > V:  # decided while compiling: only the last chunks can pass the end
        live = group < wide
        s = tl.load(s_at + first, mask=live, other=float("-inf"))
        t = tl.load(t_at + first, mask=live, other=float("-inf"))
        if WINDOW > 0:
            if tl.program_id(0) == tl.num_programs(0) - 1:  # the tensor's last classes, which fill no group
                rest = (first + lane >= wide) & (first + lane < V + shift)
                s = tl.where(rest, tl.load(s_at + first, mask=rest, other=0.0), s)
                t = tl.where(rest, tl.load(t_at + first, mask=rest, other=0.0), t)
        s, t = s.to(tl.float32), t.to(tl.float32)
    else:
        s = tl.load(s_at + first).to(tl.float32)
        t = tl.load(t_at + first).to(tl.float32)
    if WINDOW > 0:
        if c == 0:
            own = lane >= shift
            s, t = tl.where(own, s, float("-inf")), tl.where(own, t, float("-inf"))
        if first + WIDTH > V:
            own = first + lane < V + shift
            s, t = tl.where(own, s, float("-inf")), tl.where(own, t, float("-inf"))
    return s, t


@triton.jit
def _store_chunk(
    ptrs, grad, c: tl.constexpr, lane, shift, keep, valid,
    V: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Store one chunk's gradients by whole groups, and those of a window's first and last group class by class."""
    first: tl.constexpr = c * WIDTH
    whole = valid
    if WINDOW > 0:
        at, group = first + lane, first + lane // WINDOW * WINDOW
        begins: tl.constexpr = c == 0
        ends: tl.constexpr = first + WIDTH > V - WINDOW
        last = (V - 1 + shift) // WINDOW * WINDOW
        if begins:
            whole = whole & (group > 0)
            store_gradient(ptrs, grad, keep, valid & (group == 0) & (at >= shift), MASK)
        if ends:
            whole = whole & (group < last)
            store_gradient(ptrs, grad, keep, valid & (group == last) & (at < V + shift), MASK)
    elif first + WIDTH > V:
        whole = whole & (first + lane < V)
    store_gradient(ptrs, grad, keep, whole, MASK)


@triton.jit
def kd_kl_chunks_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr, NEAR: tl.constexpr = True,
):  # fmt: skip
    """One read of each logit, one write of each gradient."""
    if finished(upstream_ptr, EARLY_EXIT):
        return

    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    scale, counts, inv_t, k = row_scale(
        rows, valid, temperature, temperature_ptr, divisor, divisor_ptr, weight_ptr, mask_ptr, upstream_ptr,
        T_PTR, DIVISOR_PTR, WEIGHT, MASK, UPSTREAM,
    )  # fmt: skip
    # Rows past the end read the last one again: loads need no mask.
    outer = tl.cast(tl.minimum(rows, num_rows - 1), tl.int64)[:, None] * UNIT
    lane = tl.arange(0, WIDTH)[None, :]
    shift = tl.zeros([ROWS, 1], tl.int32)
    s_from, t_from, gs_from, gt_from = outer * s_outer, outer * t_outer, outer * gs_outer, outer * gt_outer
    if WINDOW > 0:  # every tensor's rows lie alike: one shift does for all
        shift = (s_from % WINDOW).to(tl.int32)
        s_from = s_from // WINDOW * WINDOW
        t_from, gs_from, gt_from = s_from, s_from, s_from
    # Nothing lies behind the tensor's last row: its last classes, which fill no group, are read one by one.
    wide = V + shift
    if WINDOW > 0:
        wide = tl.where((rows < num_rows - 1)[:, None], wide, wide // WINDOW * WINDOW)
    s_at, t_at = s_ptr + s_from + lane, t_ptr + t_from + lane
    gs_at, gt_at = s_at, t_at
    if GRAD_S:
        gs_at = gs_ptr + gs_from + lane
    if GRAD_T:
        gt_at = gt_ptr + gt_from + lane

    s = ()
    t = ()
    # The last chunk first, whose branch would have to carry all others.
    s_last, t_last = _chunk(s_at, t_at, CHUNKS - 1, lane, shift, wide, V, WIDTH, WINDOW)
    for c in tl.static_range(CHUNKS - 1):
        s_c, t_c = _chunk(s_at, t_at, c, lane, shift, wide, V, WIDTH, WINDOW)
        s += (s_c,)
        t += (t_c,)
    s += (s_last,)
    t += (t_last,)
    s_peak = s[0]
    t_peak = t[0]
    for c in tl.static_range(1, CHUNKS):
        s_peak = tl.maximum(s_peak, s[c])
        t_peak = tl.maximum(t_peak, t[c])
    s_top = tl.max(s_peak, axis=1)[:, None] * k
    t_top = tl.max(t_peak, axis=1)[:, None] * k

    # q and p, not yet normalised, take the place of the logits; gaps live on only for the teacher's gradient.
    q = ()
    p = ()
    gaps = ()
    s_acc = tl.zeros([ROWS, WIDTH], tl.float32)
    t_acc = tl.zeros([ROWS, WIDTH], tl.float32)
    cross = tl.zeros([ROWS, WIDTH], tl.float32)
    top_ratio = t_top - s_top
    for c in tl.static_range(CHUNKS):
        gap, q_c, p_c = unnormalised(s[c], t[c], k, s_top, t_top)
        s_acc += q_c
        t_acc += p_c
        cross += p_c * gap
        q += (q_c,)
        p += (p_c,)
        if GRAD_T:
            gaps += (gap,)
    s_inv = 1.0 / tl.sum(s_acc, axis=1)[:, None]
    t_sum = tl.sum(t_acc, axis=1)[:, None]
    t_inv = 1.0 / t_sum
    sum_ratio = tl.log2(t_sum * s_inv)
    kl = (tl.sum(cross, axis=1)[:, None] * t_inv - sum_ratio) * 0.6931471805599453

    g = tl.where(counts, scale * inv_t, 0.0)[:, None]
    keep = counts[:, None]
    store = valid[:, None]
    centre = tl.zeros([ROWS, 1], tl.float32)
    log_ratio = top_ratio + sum_ratio
    closest = 1.0
    if NEAR:
        closest = tl.min(tl.min(tl.where(keep, kl, 1.0), axis=1), axis=0)
    if closest < 1e-3:
        # Some row's student and teacher nearly agree, and its digits have cancelled. Reading the tile again
        # keeps the other branch, the common one, free of registers that live across.
        kl_acc = tl.zeros([ROWS, WIDTH], tl.float32)
        centre_acc = tl.zeros([ROWS, WIDTH], tl.float32)
        for c in tl.static_range(CHUNKS):
            s_c, t_c = _chunk(s_at, t_at, c, lane, shift, wide, V, WIDTH, WINDOW)
            gap = gap_of(s_c, t_c, k, log_ratio)
            term, difference, _ = near_terms(
                gap, tl.exp2(t_c * k - t_top) * t_inv, tl.exp2(s_c * k - s_top) * s_inv, t_c > float("-inf")
            )
            kl_acc += term
            centre_acc += difference
        kl = tl.sum(kl_acc, axis=1)[:, None]
        centre = tl.sum(centre_acc, axis=1)[:, None]
        if GRAD_S or GRAD_T:
            for c in tl.static_range(CHUNKS):
                s_c, t_c = _chunk(s_at, t_at, c, lane, shift, wide, V, WIDTH, WINDOW)
                q_c, p_c = tl.exp2(s_c * k - s_top) * s_inv, tl.exp2(t_c * k - t_top) * t_inv
                gap = gap_of(s_c, t_c, k, log_ratio)
                _, difference, delta = near_terms(gap, p_c, q_c, t_c > float("-inf"))
                if GRAD_S:
                    grad = g * (difference - centre * q_c)
                    _store_chunk(gs_at + c * WIDTH, grad, c, lane, shift, keep, store, V, WIDTH, WINDOW, MASK)
                if GRAD_T:
                    grad = g * p_c * (delta + (centre - kl))
                    _store_chunk(gt_at + c * WIDTH, grad, c, lane, shift, keep, store, V, WIDTH, WINDOW, MASK)
    else:
        s_scale, t_scale = g * s_inv, g * t_inv
        for c in tl.static_range(CHUNKS):
            if GRAD_S:
                grad = q[c] * s_scale - p[c] * t_scale
                _store_chunk(gs_at + c * WIDTH, grad, c, lane, shift, keep, store, V, WIDTH, WINDOW, MASK)
            if GRAD_T:
                grad = p[c] * t_scale * ((gaps[c] - sum_ratio) * 0.6931471805599453 - kl)
                _store_chunk(gt_at + c * WIDTH, grad, c, lane, shift, keep, store, V, WIDTH, WINDOW, MASK)
    loss = tl.where(counts, scale * tl.sum(kl, axis=1), 0.0)
    store_losses(loss, rows, valid, rows_ptr, loss_ptr, partial_ptr, counter_ptr, STORE_ROWS, REDUCE, False)
