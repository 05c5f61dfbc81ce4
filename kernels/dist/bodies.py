"""Bodies of the DIST kernels. Equations, bytes and launch plan stand in the package.

What a row needs later is kept as [6, rows]: log2-sum-exp of student and teacher, 1/D, v_s, v_t, ρ.
What a column needs is kept as [5, V]: mean of q and p, 1/D, v_s, v_t.
"""

import triton
import triton.language as tl

from ..common.rows import finished, in_strides, more_logits_of_two, no_logits, scalar
from ..common.sign import negative
from ..common.tile import over_classes, per_row, tile_at, tile_rows


@triton.jit
def _correlation(ab, aa, bb):
    """ρ = ab/(|a||b| + ε), and its derivatives' factors: ∂ρ/∂a = b/D - v_s·a, ∂ρ/∂b = a/D - v_t·b."""
    a, b = tl.sqrt(aa), tl.sqrt(bb)
    inv = 1.0 / (a * b + 1e-8)
    rho = ab * inv
    v_s = tl.where(aa > 0.0, rho * inv * b / tl.where(aa > 0.0, a, 1.0), 0.0)
    v_t = tl.where(bb > 0.0, rho * inv * a / tl.where(bb > 0.0, b, 1.0), 0.0)
    return rho, inv, v_s, v_t


@triton.jit
def _tile(ptr, row_at, classes, stride, live):
    return tl.load(ptr + row_at[:, None] + classes[None, :] * stride, mask=live, other=float("-inf")).to(
        tl.float32
    )


@triton.jit
def _store_tile(ptr, row_at, classes, stride, value, live):
    at = row_at[:, None] + classes[None, :] * stride
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def _row_starts(rows, inner, outer_stride, inner_stride, UNIT: tl.constexpr):
    outer, within = in_strides(rows // inner, rows % inner, UNIT)
    return outer * outer_stride + within * inner_stride


@triton.jit
def _store_five(ptr, step, a, b, c, d, e, live):
    """Five values of each row or column, ``step`` apart."""
    step = tl.cast(step, tl.int64)
    tl.store(ptr, a, mask=live)
    tl.store(ptr + step, b, mask=live)
    tl.store(ptr + 2 * step, c, mask=live)
    tl.store(ptr + 3 * step, d, mask=live)
    tl.store(ptr + 4 * step, e, mask=live)


@triton.jit
def dist_rows_kernel(
    s_ptr, t_ptr, row_ptr, upstream_ptr, temperature, temperature_ptr, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class,
    V: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, T_PTR: tl.constexpr,
    EARLY_EXIT: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of some rows, then their correlations: a second read, from the cache."""
    if finished(upstream_ptr, EARLY_EXIT):
        return
    k = 1.4426950408889634 / scalar(temperature, temperature_ptr, T_PTR)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    s_at = _row_starts(rows, inner, s_outer, s_inner, UNIT)
    t_at = _row_starts(rows, inner, t_outer, t_inner, UNIT)
    s_peak, s_acc = no_logits([ROWS, BLOCK])
    t_peak, t_acc = no_logits([ROWS, BLOCK])
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = valid[:, None] & (classes < V)[None, :]
        s, t = _tile(s_ptr, s_at, classes, s_class, live), _tile(t_ptr, t_at, classes, t_class, live)
        s_peak, t_peak, s_acc, t_acc = more_logits_of_two(s_peak, t_peak, s_acc, t_acc, s, t, k)
    s_top, t_top = tl.max(s_peak, axis=1), tl.max(t_peak, axis=1)
    s_log = s_top * k + tl.log2(tl.sum(s_acc * tl.exp2((s_peak - s_top[:, None]) * k), axis=1))
    t_log = t_top * k + tl.log2(tl.sum(t_acc * tl.exp2((t_peak - t_top[:, None]) * k), axis=1))

    ab = tl.zeros([ROWS, BLOCK], tl.float32)
    aa = tl.zeros([ROWS, BLOCK], tl.float32)
    bb = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = valid[:, None] & (classes < V)[None, :]
        s, t = _tile(s_ptr, s_at, classes, s_class, live), _tile(t_ptr, t_at, classes, t_class, live)
        a = tl.where(live, tl.exp2(s * k - s_log[:, None]) - 1.0 / V, 0.0)  # probabilities sum to 1
        b = tl.where(live, tl.exp2(t * k - t_log[:, None]) - 1.0 / V, 0.0)
        ab += a * b
        aa += a * a
        bb += b * b
    rho, inv, v_s, v_t = _correlation(tl.sum(ab, axis=1), tl.sum(aa, axis=1), tl.sum(bb, axis=1))
    _store_five(row_ptr + rows, num_rows, s_log, t_log, inv, v_s, v_t, valid)
    tl.store(row_ptr + 5 * tl.cast(num_rows, tl.int64) + rows, rho, mask=valid)


@triton.jit
def dist_tile_rows_kernel(
    s_ptr, t_ptr, row_ptr, upstream_ptr, temperature, temperature_ptr, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class,
    V: tl.constexpr, UNIT: tl.constexpr, LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, INNER_ONE: tl.constexpr, T_PTR: tl.constexpr, EARLY_EXIT: tl.constexpr,
):  # fmt: skip
    """The same of rows whose classes fit in registers: one read."""
    if finished(upstream_ptr, EARLY_EXIT):
        return
    k = 1.4426950408889634 / scalar(temperature, temperature_ptr, T_PTR)
    rows, valid, outer, within, classes = tile_rows(num_rows, inner, LAYOUT, CHUNKS, ROWS, WIDTH, INNER_ONE)
    outer, within = in_strides(outer, within, UNIT)
    s_at = tile_at(outer, within, classes, s_outer, s_inner, s_class, LAYOUT)
    t_at = tile_at(outer, within, classes, t_outer, t_inner, t_class, LAYOUT)
    live = per_row(valid, LAYOUT)
    if V < CHUNKS * WIDTH:
        live = live & (classes < V)
    s = tl.load(s_ptr + s_at, mask=live, other=float("-inf")).to(tl.float32)
    t = tl.load(t_ptr + t_at, mask=live, other=float("-inf")).to(tl.float32)
    s_top, t_top = over_classes(s, LAYOUT, True) * k, over_classes(t, LAYOUT, True) * k
    q, p = tl.exp2(s * k - per_row(s_top, LAYOUT)), tl.exp2(t * k - per_row(t_top, LAYOUT))
    s_sum, t_sum = over_classes(q, LAYOUT, False), over_classes(p, LAYOUT, False)
    a = tl.where(live, q * per_row(1.0 / s_sum, LAYOUT) - 1.0 / V, 0.0)  # probabilities sum to 1
    b = tl.where(live, p * per_row(1.0 / t_sum, LAYOUT) - 1.0 / V, 0.0)
    rho, inv, v_s, v_t = _correlation(
        over_classes(a * b, LAYOUT, False), over_classes(a * a, LAYOUT, False), over_classes(b * b, LAYOUT, False)
    )
    s_log, t_log = s_top + tl.log2(s_sum), t_top + tl.log2(t_sum)
    _store_five(row_ptr + rows, num_rows, s_log, t_log, inv, v_s, v_t, valid)
    tl.store(row_ptr + 5 * tl.cast(num_rows, tl.int64) + rows, rho, mask=valid)


@triton.jit
def _merge(n, mean_a, mean_b, ab, aa, bb, counts, means_a, means_b, abs_, aas, bbs):
    """Counts, means and centred moments of groups of rows, [groups, columns], with those of the rows before them.

    Of what groups have between them only squares of differences are taken (Chan et al. 1983): nothing cancels.
    """
    more = tl.sum(counts, axis=0)
    a, b = tl.sum(counts[:, None] * means_a, axis=0) / more, tl.sum(counts[:, None] * means_b, axis=0) / more
    d_a, d_b = means_a - a[None, :], means_b - b[None, :]
    w_a, w_b = counts[:, None] * d_a, counts[:, None] * d_b
    ab += tl.sum(abs_ + w_a * d_b, axis=0)
    aa += tl.sum(aas + w_a * d_a, axis=0)
    bb += tl.sum(bbs + w_b * d_b, axis=0)
    total = n + more
    share = more / total
    d_a, d_b = a - mean_a, b - mean_b
    between = n * share
    return (
        total, mean_a + d_a * share, mean_b + d_b * share,
        ab + d_a * d_b * between, aa + d_a * d_a * between, bb + d_b * d_b * between,
    )  # fmt: skip


@triton.jit
def _of_columns(
    s_ptr, t_ptr, row_ptr, rows, last, classes, k, num_rows, inner, s_outer, s_inner, s_class, t_outer, t_inner, t_class,
    V: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Probabilities of a tile, 0 where there is none, and 1 for each of ``rows`` before ``last``, else 0."""
    valid = rows < last
    live = valid[:, None] & (classes < V)[None, :]
    s = _tile(s_ptr, _row_starts(rows, inner, s_outer, s_inner, UNIT), classes, s_class, live)
    t = _tile(t_ptr, _row_starts(rows, inner, t_outer, t_inner, UNIT), classes, t_class, live)
    s_log = tl.load(row_ptr + rows, mask=valid, other=0.0)
    t_log = tl.load(row_ptr + num_rows + rows, mask=valid, other=0.0)
    return tl.exp2(s * k - s_log[:, None]), tl.exp2(t * k - t_log[:, None]), valid.to(tl.float32)


@triton.jit
def _add_columns(a_sum, b_sum, ab, aa, bb, q, p, valid, q_shift, p_shift):
    """Sums of what lies above the shifts, in the threads that have them; rows that are not there add 0."""
    a, b = q - valid[:, None] * q_shift[None, :], p - valid[:, None] * p_shift[None, :]
    return a_sum + a, b_sum + b, ab + a * b, aa + a * a, bb + b * b


@triton.jit
def _not_below_zero(x):
    """Where all values of a column are the same, rounding is all that is left: a device's divisions err by two units."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def dist_columns_kernel(
    s_ptr, t_ptr, row_ptr, part_ptr, upstream_ptr, temperature, temperature_ptr, num_rows, inner, rows_per_split,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class,
    V: tl.constexpr, UNIT: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    T_PTR: tl.constexpr, EARLY_EXIT: tl.constexpr,
):  # fmt: skip
    """Moments of some columns over some of the rows.

    Sums of powers of what lies above the first tile's mean, each thread its own until the last row. That tile is one of
    those summed, so of a square's sum no more cancels than the part of the rows that it is not: with n rows, n₀ of them
    in the tile, Σ(q - shift)² ≤ (1 + n/n₀)·Σ(q - mean)².
    """
    if finished(upstream_ptr, EARLY_EXIT):
        return
    k = 1.4426950408889634 / scalar(temperature, temperature_ptr, T_PTR)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    classes = columns.to(tl.int64)
    first = tl.program_id(1) * rows_per_split
    last = tl.minimum(first + rows_per_split, num_rows)
    lanes = tl.arange(0, ROWS)
    q, p, valid = _of_columns(
        s_ptr, t_ptr, row_ptr, first + lanes, last, classes, k, num_rows, inner,
        s_outer, s_inner, s_class, t_outer, t_inner, t_class, V, UNIT,
    )  # fmt: skip
    count = tl.minimum(last - first, ROWS).to(tl.float32)
    q_shift, p_shift = tl.sum(q, axis=0) / count, tl.sum(p, axis=0) / count
    zero = tl.zeros([ROWS, COLUMNS], tl.float32)
    a, b, ab, aa, bb = _add_columns(zero, zero, zero, zero, zero, q, p, valid, q_shift, p_shift)
    for start in range(first + ROWS, last, TURNS * ROWS):
        for turn in tl.static_range(TURNS):
            q, p, valid = _of_columns(
                s_ptr, t_ptr, row_ptr, start + turn * ROWS + lanes, last, classes, k, num_rows, inner,
                s_outer, s_inner, s_class, t_outer, t_inner, t_class, V, UNIT,
            )  # fmt: skip
            a, b, ab, aa, bb = _add_columns(a, b, ab, aa, bb, q, p, valid, q_shift, p_shift)
    n = (last - first).to(tl.float32)
    a_sum, b_sum = tl.sum(a, axis=0), tl.sum(b, axis=0)
    a_mean, b_mean = a_sum / n, b_sum / n
    part = part_ptr + tl.cast(tl.program_id(1), tl.int64) * 5 * V + columns
    _store_five(
        part, V, q_shift + a_mean, p_shift + b_mean, tl.sum(ab, axis=0) - a_sum * b_mean,
        _not_below_zero(tl.sum(aa, axis=0) - a_sum * a_mean), _not_below_zero(tl.sum(bb, axis=0) - b_sum * b_mean),
        columns < V,
    )  # fmt: skip


@triton.jit
def dist_merge_kernel(
    row_ptr, part_ptr, column_ptr, partial_ptr, counter_ptr, loss_ptr, upstream_ptr,
    temperature, temperature_ptr, divisor, divisor_ptr, beta, gamma, num_rows, rows_per_split, splits,
    V: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr,
    EARLY_EXIT: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Merge the splits, SPLITS at a time, in a fixed order; the program that finishes last writes the loss."""
    if finished(upstream_ptr, EARLY_EXIT):
        return
    pid = tl.program_id(0)
    columns = pid * COLUMNS + tl.arange(0, COLUMNS)
    live = columns < V
    zero = tl.zeros([COLUMNS], tl.float32)
    n = 0.0
    mean_a, mean_b, ab, aa, bb = zero, zero, zero, zero, zero
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        part = part_ptr + split.to(tl.int64)[:, None] * (5 * V) + columns[None, :]
        inside = (split < splits)[:, None] & live[None, :]
        counts = tl.where(split < splits, tl.minimum(num_rows - split * rows_per_split, rows_per_split), 0)
        n, mean_a, mean_b, ab, aa, bb = _merge(
            n, mean_a, mean_b, ab, aa, bb, counts.to(tl.float32), tl.load(part, mask=inside, other=0.0),
            tl.load(part + V, mask=inside, other=0.0), tl.load(part + 2 * V, mask=inside, other=0.0),
            tl.load(part + 3 * V, mask=inside, other=0.0), tl.load(part + 4 * V, mask=inside, other=0.0),
        )  # fmt: skip
    rho, inv, v_s, v_t = _correlation(ab, aa, bb)
    _store_five(column_ptr + columns, V, mean_a, mean_b, inv, v_s, v_t, live)
    if REDUCE:
        tl.store(partial_ptr + pid, tl.sum(tl.where(live, 1.0 - rho, 0.0), axis=0))
        # One scalar store a program, then a release: nobody reads a partial before its counter has moved.
        tl.debug_barrier()
        programs = tl.num_programs(0)
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived == programs - 1:
            intra = tl.zeros([1024], tl.float32)
            inter = tl.zeros([1024], tl.float32)
            for start in range(0, programs, 1024):
                at = start + tl.arange(0, 1024)
                intra += tl.load(partial_ptr + at, mask=at < programs, other=0.0, volatile=True)
            for start in range(0, num_rows, 1024):
                at = start + tl.arange(0, 1024)
                row = row_ptr + 5 * tl.cast(num_rows, tl.int64) + at
                inter += 1.0 - tl.load(row, mask=at < num_rows, other=1.0)
            T = scalar(temperature, temperature_ptr, T_PTR)
            factor = T * T / scalar(divisor, divisor_ptr, DIVISOR_PTR)
            loss = beta * (tl.sum(inter, axis=0) / num_rows) + gamma * (tl.sum(intra, axis=0) / V)
            tl.store(loss_ptr, factor * loss)
            tl.store(counter_ptr, 0)


@triton.jit
def _slope(a, b, inv, v, a_column, b_column, inv_column, v_column, inter, intra, live):
    """∂loss/∂probability, without T²: what raises the two correlations lowers the loss."""
    row = inv[:, None] * b - v[:, None] * a
    column = inv_column[None, :] * b_column - v_column[None, :] * a_column
    return tl.where(live, negative(inter * row + intra * column), 0.0)


@triton.jit
def dist_gradient_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, row_ptr, column_ptr, upstream_ptr,
    temperature, temperature_ptr, divisor, divisor_ptr, beta, gamma, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, T_PTR: tl.constexpr,
    DIVISOR_PTR: tl.constexpr, UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
):  # fmt: skip
    """Σ q·slope of some rows, then their gradients: a second read, from the cache."""
    if finished(upstream_ptr, EARLY_EXIT):
        return
    T = scalar(temperature, temperature_ptr, T_PTR)
    factor = T / scalar(divisor, divisor_ptr, DIVISOR_PTR)  # T² of the loss over T of the softmax
    if UPSTREAM:
        factor *= tl.load(upstream_ptr).to(tl.float32)
    k = 1.4426950408889634 / T
    inter, intra = factor * beta / num_rows, factor * gamma / V
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    s_at = _row_starts(rows, inner, s_outer, s_inner, UNIT)
    t_at = _row_starts(rows, inner, t_outer, t_inner, UNIT)
    s_log = tl.load(row_ptr + rows, mask=valid, other=0.0)
    t_log = tl.load(row_ptr + num_rows + rows, mask=valid, other=0.0)
    step = tl.cast(num_rows, tl.int64)
    inv = tl.load(row_ptr + 2 * step + rows, mask=valid, other=0.0)
    v_s = tl.load(row_ptr + 3 * step + rows, mask=valid, other=0.0)
    v_t = tl.load(row_ptr + 4 * step + rows, mask=valid, other=0.0)
    s_total = tl.zeros([ROWS], tl.float32)
    t_total = tl.zeros([ROWS], tl.float32)
    for store in tl.static_range(2):
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            classes = columns.to(tl.int64)
            inside = columns < V
            live = valid[:, None] & inside[None, :]
            s, t = _tile(s_ptr, s_at, classes, s_class, live), _tile(t_ptr, t_at, classes, t_class, live)
            q, p = tl.exp2(s * k - s_log[:, None]), tl.exp2(t * k - t_log[:, None])
            a_column = q - tl.load(column_ptr + columns, mask=inside, other=0.0)[None, :]
            b_column = p - tl.load(column_ptr + V + columns, mask=inside, other=0.0)[None, :]
            inv_column = tl.load(column_ptr + 2 * V + columns, mask=inside, other=0.0)
            if GRAD_S:
                v_column = tl.load(column_ptr + 3 * V + columns, mask=inside, other=0.0)
                slope = _slope(q - 1.0 / V, p - 1.0 / V, inv, v_s, a_column, b_column, inv_column, v_column,
                               inter, intra, live)  # fmt: skip
                if store == 0:
                    s_total += tl.sum(q * slope, axis=1)
                else:
                    row_at = _row_starts(rows, inner, gs_outer, gs_inner, UNIT)
                    grad = q * (slope - s_total[:, None])
                    _store_tile(gs_ptr, row_at, classes, gs_class, grad, live)
            if GRAD_T:
                v_column = tl.load(column_ptr + 4 * V + columns, mask=inside, other=0.0)
                slope = _slope(p - 1.0 / V, q - 1.0 / V, inv, v_t, b_column, a_column, inv_column, v_column,
                               inter, intra, live)  # fmt: skip
                if store == 0:
                    t_total += tl.sum(p * slope, axis=1)
                else:
                    row_at = _row_starts(rows, inner, gt_outer, gt_inner, UNIT)
                    grad = p * (slope - t_total[:, None])
                    _store_tile(gt_ptr, row_at, classes, gt_class, grad, live)
