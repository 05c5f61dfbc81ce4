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
def _divergence_terms(delta, p, q, present):
    """(p·(δ + expm1(-δ)), p·expm1(-δ)), each without cancellation; see the file's head."""
    x = -delta
    # A series instead of libdevice's expm1: 8e-7 of h at |x| = 1/2, and it runs in the interpreter.
    h = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040)))))
    near = (tl.abs(delta) < 0.5) & present
    near_term = p * delta * delta * h
    far = q - p
    term = tl.where(near, near_term, p * delta + far)
    difference = tl.where(near, near_term - p * delta, far)
    return term, difference


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
def kd_kl_tile_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr,
    num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    INNER_ONE: tl.constexpr, T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
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
        classes = tl.arange(0, CHUNKS)[:, None]
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
    outer = tl.cast(outer, tl.int64)
    within = tl.cast(within, tl.int64)
    scale, counts = _row_factor(
        rows, valid, weight_ptr, mask_ptr, upstream_ptr, factor, WEIGHT, MASK, UPSTREAM
    )
    # `within` joins last: for a tile of pixels it carries the contiguity that makes loads wide.
    wide = classes if LAYOUT != 2 else tl.cast(classes, tl.int64)
    s_at = _per_row(outer * s_outer + within * s_inner, LAYOUT) + wide * s_class
    t_at = _per_row(outer * t_outer + within * t_inner, LAYOUT) + wide * t_class
    live = _per_row(valid, LAYOUT) & (classes < V)

    s = tl.load(s_ptr + s_at, mask=live, other=float("-inf")).to(tl.float32)
    t = tl.load(t_ptr + t_at, mask=live, other=float("-inf")).to(tl.float32)
    present = t > float("-inf")

    s_max = _over_classes(s, LAYOUT, True)
    t_max = _over_classes(t, LAYOUT, True)
    q = tl.exp((s - _per_row(s_max, LAYOUT)) * inv_t)
    p = tl.exp((t - _per_row(t_max, LAYOUT)) * inv_t)
    s_sum = _over_classes(q, LAYOUT, False)
    t_sum = _over_classes(p, LAYOUT, False)
    q *= _per_row(1.0 / s_sum, LAYOUT)
    p *= _per_row(1.0 / t_sum, LAYOUT)
    # Logits are subtracted before anything is scaled: exact when student and teacher are close.
    log_ratio = (t_max - s_max) * inv_t + tl.log(t_sum) - tl.log(s_sum)
    delta = tl.where(present, (t - s) * inv_t - _per_row(log_ratio, LAYOUT), 0.0)
    term, difference = _divergence_terms(delta, p, q, present)
    kl = _over_classes(term, LAYOUT, False)

    if GRAD_S or GRAD_T:
        centre = _over_classes(difference, LAYOUT, False)
        g = _per_row(tl.where(counts, scale * inv_t, 0.0), LAYOUT)
        keep = _per_row(counts, LAYOUT)  # a row that does not count gets 0, even where its logits are NaN
        if GRAD_S:
            grad = tl.where(keep, g * (difference - _per_row(centre, LAYOUT) * q), 0.0)
            at = _per_row(outer * gs_outer + within * gs_inner, LAYOUT) + wide * gs_class
            tl.store(gs_ptr + at, grad.to(gs_ptr.dtype.element_ty), mask=live)
        if GRAD_T:
            grad = tl.where(keep, g * p * (delta + _per_row(centre - kl, LAYOUT)), 0.0)
            at = _per_row(outer * gt_outer + within * gt_inner, LAYOUT) + wide * gt_class
            tl.store(gt_ptr + at, grad.to(gt_ptr.dtype.element_ty), mask=live)
    loss = tl.where(counts, scale * kl, 0.0)
    if STORE_ROWS:
        tl.store(rows_ptr + rows, loss, mask=valid)
    if REDUCE:
        if LAYOUT == 3:
            _reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
        else:
            _reduce_last(tl.sum(loss, axis=0), loss_ptr, partial_ptr, counter_ptr, 1024)


@triton.jit
def _store_gradients(
    s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class,
    g, counts, inv_t, s_max, t_max, s_inv, t_inv, log_ratio, centre, kl_shift,
    V: tl.constexpr, BLOCK: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
):  # fmt: skip
    """One pass over a row that writes its gradients; returns the row's (KL, S) from the same read."""
    kl = tl.zeros([BLOCK], tl.float32)
    recentre = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = tl.load(s_row + classes * s_class, mask=live, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + classes * t_class, mask=live, other=float("-inf")).to(tl.float32)
        present = t > float("-inf")
        q = tl.exp((s - s_max) * inv_t) * s_inv
        p = tl.exp((t - t_max) * inv_t) * t_inv
        delta = tl.where(present, (t - s) * inv_t - log_ratio, 0.0)
        term, difference = _divergence_terms(delta, p, q, present)
        kl += term
        recentre += difference
        if GRAD_S:
            grad = tl.where(counts, g * (difference - centre * q), 0.0)
            tl.store(gs_row + classes * gs_class, grad.to(gs_row.dtype.element_ty), mask=live)
        if GRAD_T:
            grad = tl.where(counts, g * p * (delta + centre - kl_shift), 0.0)
            tl.store(gt_row + classes * gt_class, grad.to(gt_row.dtype.element_ty), mask=live)
    return tl.sum(kl, axis=0), tl.sum(recentre, axis=0)


@triton.jit
def kd_kl_two_pass_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr,
    num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, BLOCK: tl.constexpr,
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
    row = tl.program_id(0)
    outer, within = tl.cast(row // inner, tl.int64), tl.cast(row % inner, tl.int64)
    scale, counts = _row_factor(
        row, row < num_rows, weight_ptr, mask_ptr, upstream_ptr, factor, WEIGHT, MASK, UPSTREAM
    )
    s_row = s_ptr + outer * s_outer + within * s_inner
    t_row = t_ptr + outer * t_outer + within * t_inner

    # Online log-sum-exp a lane (Milakov & Gimelshein 2018), and Σ e^t·(t - s), which gives KL for the
    # teacher's gradient before the second pass begins.
    lowest: tl.constexpr = float("-inf")
    s_peak = tl.full([BLOCK], lowest, tl.float32)
    t_peak = tl.full([BLOCK], lowest, tl.float32)
    s_acc = tl.zeros([BLOCK], tl.float32)
    t_acc = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = tl.load(s_row + classes * s_class, mask=live, other=lowest).to(tl.float32)
        t = tl.load(t_row + classes * t_class, mask=live, other=lowest).to(tl.float32)
        s_new, t_new = tl.maximum(s_peak, s), tl.maximum(t_peak, t)
        # A lane that has seen only -inf keeps sum 0; -inf - -inf would be NaN.
        s_old = tl.where(s_peak > lowest, tl.exp((s_peak - s_new) * inv_t), 0.0)
        t_old = tl.where(t_peak > lowest, tl.exp((t_peak - t_new) * inv_t), 0.0)
        s_exp = tl.where(s > lowest, tl.exp((s - s_new) * inv_t), 0.0)
        t_exp = tl.where(t > lowest, tl.exp((t - t_new) * inv_t), 0.0)
        s_acc = s_acc * s_old + s_exp
        t_acc = t_acc * t_old + t_exp
        cross = cross * t_old + tl.where(t > lowest, t_exp * (t - s), 0.0)
        s_peak, t_peak = s_new, t_new
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    s_sum = tl.sum(tl.where(s_peak > lowest, s_acc * tl.exp((s_peak - s_max) * inv_t), 0.0), axis=0)
    t_lane = tl.where(t_peak > lowest, tl.exp((t_peak - t_max) * inv_t), 0.0)
    t_sum = tl.sum(t_acc * t_lane, axis=0)
    log_ratio = (t_max - s_max) * inv_t + tl.log(t_sum) - tl.log(s_sum)
    rough_kl = tl.sum(cross * t_lane, axis=0) / t_sum * inv_t - log_ratio

    g = scale * inv_t
    gs_row, gt_row = gs_ptr, gt_ptr
    if GRAD_S:
        gs_row += outer * gs_outer + within * gs_inner
    if GRAD_T:
        gt_row += outer * gt_outer + within * gt_inner
    kl, centre = _store_gradients(
        s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class,
        g, counts, inv_t, s_max, t_max, 1.0 / s_sum, 1.0 / t_sum, log_ratio, 0.0, rough_kl, V, BLOCK, GRAD_S, GRAD_T,
    )  # fmt: skip
    if GRAD_S or GRAD_T:
        # Student and teacher nearly agree: the rounding of the log-sum-exps shows in q - p. Write again,
        # recentred; such rows are rare, and they are the ones whose priorities matter.
        if kl < 1e-3:
            _store_gradients(
                s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class,
                g, counts, inv_t, s_max, t_max, 1.0 / s_sum, 1.0 / t_sum, log_ratio, centre, kl,
                V, BLOCK, GRAD_S, GRAD_T,
            )  # fmt: skip
    loss = tl.where(counts, scale * kl, 0.0)
    if STORE_ROWS:
        tl.store(rows_ptr + row, loss)
    if REDUCE:
        _reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
