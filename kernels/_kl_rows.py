"""Bodies of the KL kernels. Equations, bytes and launch plans stand in losses.py.

A tile's dimensions are used in one of four ways; the class dimension is what is summed out:

    0  [chunk, row, lane]   classes = chunk·WIDTH + lane
    1  [row, chunk, lane]   the same, in the order that Triton 3.6 compiles well
    2  [class, pixel]       class dimension 1 of [B, C, H, W], vectorised along pixels
    3  [class]              one row a program
"""

import triton
import triton.language as tl


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
def _gap(s, t, k, log_ratio):
    """log2 p - log2 q. Logits are subtracted before anything is scaled: exact when they are close.

    A class that is absent in the teacher gives a huge finite number instead of -inf (or of NaN, when it is
    absent in both): what follows multiplies it by p = 0, and 0·inf would be NaN.
    """
    return tl.maximum((t - s) * k - log_ratio, -1e30)


@triton.jit
def _near_terms(gap, p, q, present):
    """(p·(δ + expm1(-δ)), p·expm1(-δ), δ), none of which cancels when student and teacher nearly agree."""
    delta = tl.where(present, gap * 0.6931471805599453, 0.0)
    x = -delta
    # A series instead of libdevice's expm1: 8e-7 of h at |x| = 1/2, and it runs in the interpreter.
    h = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040)))))
    near = (tl.abs(delta) < 0.5) & present
    near_term = p * delta * delta * h
    far = q - p
    term = tl.where(near, near_term, p * delta + far)
    difference = tl.where(near, near_term - p * delta, far)
    return term, difference, delta


@triton.jit
def _scalar(value, ptr, FROM_MEMORY: tl.constexpr):
    """A launch argument, or the same from device memory so that a graph replay sees its current value."""
    if FROM_MEMORY:
        out = tl.load(ptr).to(tl.float32)
    else:
        out = value
    return out


@triton.jit
def _row_factor(rows, valid, weight_ptr, mask_ptr, upstream_ptr, factor,
                WEIGHT: tl.constexpr, MASK: tl.constexpr, UPSTREAM: tl.constexpr):  # fmt: skip
    """c of each row, and whether the row counts. UPSTREAM: 0 none, 1 one value (in ``factor``), 2 one a row."""
    scale = tl.where(valid, factor, 0.0)
    counts = valid
    if WEIGHT:
        scale *= tl.load(weight_ptr + rows, mask=valid, other=0.0).to(tl.float32)
    if MASK:
        counts = valid & (tl.load(mask_ptr + rows, mask=valid, other=0) != 0)
    if UPSTREAM == 2:
        scale *= tl.load(upstream_ptr + rows, mask=valid, other=0.0).to(tl.float32)
    return scale, counts


@triton.jit
def _reduce_last(partial, loss_ptr, partial_ptr, counter_ptr, BLOCK: tl.constexpr):
    """Sum the programs' partial losses in a fixed order, in the program that finishes last."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partial_ptr + pid, partial)
    # One scalar store a program, then a release: nobody reads a partial before its counter has moved.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == programs - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, programs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr + index, mask=index < programs, other=0.0, volatile=True)
        tl.store(loss_ptr, tl.sum(total, axis=0))
        tl.store(counter_ptr, 0)


@triton.jit
def _store_gradient(ptrs, grad, keep, live, MASK: tl.constexpr):
    if MASK:
        grad = tl.where(keep, grad, 0.0)
    tl.store(ptrs, grad.to(ptrs.dtype.element_ty), mask=live)


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
    T = _scalar(temperature, temperature_ptr, T_PTR)
    factor = T * T / _scalar(divisor, divisor_ptr, DIVISOR_PTR)
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
    scale, counts = _row_factor(rows, valid, weight_ptr, mask_ptr, upstream_ptr, factor, WEIGHT, MASK, UPSTREAM)
    # Outer strides come in units that divide them all: the compiler sees the alignment, and loads stay wide.
    outer = tl.cast(outer, tl.int64) * UNIT
    within = tl.cast(within, tl.int64)
    s_at = _per_row(outer * s_outer + within * s_inner, LAYOUT) + classes * s_class
    t_at = _per_row(outer * t_outer + within * t_inner, LAYOUT) + classes * t_class
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
    gap = _gap(s, t, k, _per_row(log_ratio, LAYOUT))
    kl = _over_classes(p * gap, LAYOUT, False) * (t_inv * 0.6931471805599453)

    g = tl.where(counts, scale * inv_t, 0.0)
    keep = _per_row(counts, LAYOUT)  # a row that does not count gets 0, even where its logits are NaN
    gs_at = _per_row(outer * gs_outer + within * gs_inner, LAYOUT) + classes * gs_class
    gt_at = _per_row(outer * gt_outer + within * gt_inner, LAYOUT) + classes * gt_class
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
        gap = _gap(s, t, k, _per_row(log_ratio, LAYOUT))
        term, difference, delta = _near_terms(gap, p, q, t > float("-inf"))
        kl = _over_classes(term, LAYOUT, False)
        if GRAD_S or GRAD_T:
            centre = _over_classes(difference, LAYOUT, False)
        if GRAD_S:
            grad = _per_row(g, LAYOUT) * (difference - _per_row(centre, LAYOUT) * q)
            _store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            grad = _per_row(g, LAYOUT) * p * (delta + _per_row(centre - kl, LAYOUT))
            _store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    else:
        if GRAD_S:
            grad = q * _per_row(g * s_inv, LAYOUT) - p * _per_row(g * t_inv, LAYOUT)
            _store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            grad = p * _per_row(g * t_inv, LAYOUT) * (gap * 0.6931471805599453 - _per_row(kl, LAYOUT))
            _store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    loss = tl.where(counts, scale * kl, 0.0)
    if STORE_ROWS:
        tl.store(rows_ptr + rows, loss, mask=valid)
    if REDUCE:
        if LAYOUT == 3:
            _reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
        else:
            _reduce_last(tl.sum(loss, axis=0), loss_ptr, partial_ptr, counter_ptr, 1024)


@triton.jit
def _second_pass(
    s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class,
    g, counts, k, s_top, t_top, s_inv, t_inv, log_ratio, centre, kl,
    V: tl.constexpr, BLOCK: tl.constexpr, NEAR: tl.constexpr, STORE_S: tl.constexpr, STORE_T: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Read a row once more: store its gradients, and return (KL, S). NEAR: the form that does not cancel."""
    kl_sum = tl.zeros([BLOCK], tl.float32)
    centre_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = tl.load(s_row + classes * s_class, mask=live, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + classes * t_class, mask=live, other=float("-inf")).to(tl.float32)
        q = tl.exp2(s * k - s_top) * s_inv
        p = tl.exp2(t * k - t_top) * t_inv
        gap = _gap(s, t, k, log_ratio)
        if NEAR:
            term, difference, delta = _near_terms(gap, p, q, t > float("-inf"))
            centre_sum += difference
        else:
            delta = gap * 0.6931471805599453
            difference = q - p
            term = p * delta
        kl_sum += term
        if STORE_S:
            _store_gradient(gs_row + classes * gs_class, g * (difference - centre * q), counts, live, MASK)
        if STORE_T:
            _store_gradient(gt_row + classes * gt_class, g * p * (delta + centre - kl), counts, live, MASK)
    return tl.sum(kl_sum, axis=0), tl.sum(centre_sum, axis=0)


@triton.jit
def kd_kl_two_pass_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr,
    num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Rows that do not fit on the chip: read once for the log-sum-exps, once more for loss and gradients."""
    T = _scalar(temperature, temperature_ptr, T_PTR)
    factor = T * T / _scalar(divisor, divisor_ptr, DIVISOR_PTR)
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
    scale, counts = _row_factor(row, row < num_rows, weight_ptr, mask_ptr, upstream_ptr, factor, WEIGHT, MASK, UPSTREAM)
    s_row = s_ptr + outer * s_outer + within * s_inner
    t_row = t_ptr + outer * t_outer + within * t_inner

    # Online log-sum-exp a lane (Milakov & Gimelshein 2018), and Σ e^t·(t - s), which gives KL for the
    # teacher's gradient before the second pass begins. A lane's peak starts far below any logit, and finite:
    # -inf - -inf would be NaN.
    s_peak = tl.full([BLOCK], -1e38, tl.float32)
    t_peak = tl.full([BLOCK], -1e38, tl.float32)
    s_acc = tl.zeros([BLOCK], tl.float32)
    t_acc = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = tl.load(s_row + classes * s_class, mask=live, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + classes * t_class, mask=live, other=float("-inf")).to(tl.float32)
        s_new, t_new = tl.maximum(s_peak, s), tl.maximum(t_peak, t)
        t_old, t_exp = tl.exp2((t_peak - t_new) * k), tl.exp2((t - t_new) * k)
        s_acc = s_acc * tl.exp2((s_peak - s_new) * k) + tl.exp2((s - s_new) * k)
        t_acc = t_acc * t_old + t_exp
        cross = cross * t_old + t_exp * tl.maximum(t - s, -1e30)
        s_peak, t_peak = s_new, t_new
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    s_top, t_top = s_max * k, t_max * k
    t_lane = tl.exp2((t_peak - t_max) * k)
    s_inv = 1.0 / tl.sum(s_acc * tl.exp2((s_peak - s_max) * k), axis=0)
    t_sum = tl.sum(t_acc * t_lane, axis=0)
    t_inv = 1.0 / t_sum
    log_ratio = (t_top - s_top) + tl.log2(t_sum * s_inv)
    kl = (tl.sum(cross * t_lane, axis=0) * t_inv * k - log_ratio) * 0.6931471805599453

    g = tl.where(counts, scale * inv_t, 0.0)
    gs_row, gt_row = gs_ptr, gt_ptr
    if GRAD_S:
        gs_row += outer * gs_outer + within * gs_inner
    if GRAD_T:
        gt_row += outer * gt_outer + within * gt_inner
    if kl < 1e-3:
        # Student and teacher nearly agree: KL and S first, in the form that does not cancel, then gradients.
        kl, centre = _second_pass(
            s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, g, counts,
            k, s_top, t_top, s_inv, t_inv, log_ratio, 0.0, 0.0, V, BLOCK, True, False, False, MASK,
        )  # fmt: skip
        if GRAD_S or GRAD_T:
            _second_pass(
                s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, g, counts,
                k, s_top, t_top, s_inv, t_inv, log_ratio, centre, kl, V, BLOCK, True, GRAD_S, GRAD_T, MASK,
            )  # fmt: skip
    else:
        kl, _ = _second_pass(
            s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, g, counts,
            k, s_top, t_top, s_inv, t_inv, log_ratio, 0.0, kl, V, BLOCK, False, GRAD_S, GRAD_T, MASK,
        )  # fmt: skip
    loss = tl.where(counts, scale * kl, 0.0)
    if STORE_ROWS:
        tl.store(rows_ptr + row, loss)
    if REDUCE:
        _reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
