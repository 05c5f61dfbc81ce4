"""Bodies of the batch-norm kernels; equations, traffic and launch plans: norm.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.reduce import reduce_last
from ..common.walk import window


@triton.jit
def _offset(start, WIDE: tl.constexpr):
    if WIDE:
        return start.to(tl.int64)
    else:
        return start


@triton.jit
def _positions(step, rows, SPAN: tl.constexpr, BM: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr):
    """Values of one channel in the tiles before ``step``."""
    step = _offset(step, WIDE)
    if SPAN == 1:
        return tl.minimum(step * BM, rows)
    elif WINDOW:
        return step * SPAN
    else:
        CHUNKS: tl.constexpr = (SPAN + BM - 1) // BM
        return (step // CHUNKS) * SPAN + tl.minimum((step % CHUNKS) * BM, SPAN)


@triton.jit
def _tile(
    step, c, rows,
    C: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Tile ``step`` of channels ``c``: offsets ``[BC, BM]``, lanes to load, lanes that count."""
    lanes = tl.arange(0, BM)
    step, c = _offset(step, WIDE), _offset(c, WIDE)
    known = (c < C)[:, None]
    if SPAN == 1:  # channels last: one row of C values a position
        m = step * BM + lanes
        live = known & (m < rows)[None, :]
        return m[None, :] * C + c[:, None], live, live
    elif WINDOW:  # a channel's SPAN values, read from 8 elements' boundary on, so that loads stay wide
        at, reads, live = window(c, lanes, C, SPAN)
        return step * (C * SPAN) + at, reads, live
    else:
        CHUNKS: tl.constexpr = (SPAN + BM - 1) // BM
        s = (step % CHUNKS) * BM + lanes
        live = known & (s < SPAN)[None, :]
        return (step // CHUNKS) * (C * SPAN) + c[:, None] * SPAN + s[None, :], live, live


@triton.jit
def _load(ptr, offset, reads, live):
    return tl.where(live, tl.load(ptr + offset, mask=reads, other=0).to(tl.float32), 0.0)


@triton.jit
def _channel(ptr, at, live, default):
    """A value a channel; ``default`` where there is no such tensor."""
    if ptr is not None:
        return tl.load(ptr + at, mask=live, other=0).to(tl.float32)
    else:
        return tl.full(at.shape, default, tl.float32)


@triton.jit
def _last_to_arrive(counter_ptr):
    """Whether all programs of these channels have stored their partial sums."""
    tl.debug_barrier()  # nothing orders the stores of other threads before the atomic
    return (
        tl.atomic_add(counter_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1
    )


@triton.jit
def _partials(partial_ptr, which, c, P, C: tl.constexpr, BP: tl.constexpr):
    """Every program's ``which`` of channels ``c``: ``[BP, BC]``."""
    p = tl.arange(0, BP)
    at = (which * P + p)[:, None] * C + c[None, :]
    return tl.load(partial_ptr + at, mask=(p < P)[:, None] & (c < C)[None, :], other=0.0, volatile=True)


@triton.jit
def _store_partial(partial_ptr, which, value, c, C: tl.constexpr):
    at = (which * tl.num_programs(1) + tl.program_id(1)) * C + c
    tl.store(partial_ptr + at, value, mask=c < C)


@triton.jit
def _track(running_ptr, new, c, live, factor):
    old = tl.load(running_ptr + c, mask=live, other=0).to(tl.float32)
    tl.store(running_ptr + c, (old + factor * (new - old)).to(running_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows", "steps", "per"])
def bn_statistics_kernel(
    x_ptr, t_ptr, mean_ptr, rstd_ptr, var_ptr, sums_ptr, weight_ptr, bias_ptr,
    running_mean_ptr, running_var_ptr, tracked_ptr, partial_ptr, counter_ptr,
    rows, steps, per, count, momentum, eps, error_scale,
    C: tl.constexpr, SPAN: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    WINDOW: tl.constexpr, WIDE: tl.constexpr, TRAINING: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """Mean and variance of some channels over some tiles; the last program of the channels combines them all."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    part = tl.program_id(1)
    begin = part * per
    end = tl.minimum(begin + per, steps)
    k = (_positions(end, rows, SPAN, BM, WINDOW, WIDE) - _positions(begin, rows, SPAN, BM, WINDOW, WIDE)).to(
        tl.float32
    )

    # Sums are taken about the first tile's mean: a large mean must not swallow a small variance.
    offset, reads, live = _tile(begin, c, rows, C, SPAN, BM, WINDOW, WIDE)
    here = tl.maximum(tl.sum(live.to(tl.float32), axis=1), 1.0)
    shift = tl.sum(_load(x_ptr, offset, reads, live), axis=1) / here
    d1 = tl.zeros([BC, BM], tl.float32)
    d2 = tl.zeros([BC, BM], tl.float32)
    if t_ptr is not None:
        t_shift = tl.sum(_load(t_ptr, offset, reads, live), axis=1) / here
        t1 = tl.zeros([BC, BM], tl.float32)
        td = tl.zeros([BC, BM], tl.float32)
    # Copies to shared memory run three tiles ahead, or two of x and two of t: a load at a time waits out its latency.
    AHEAD: tl.constexpr = 3 if t_ptr is None else 2
    for step in tl.range(begin, end, num_stages=AHEAD + 1):
        offset, reads, live = _tile(step, c, rows, C, SPAN, BM, WINDOW, WIDE)
        d = tl.where(live, _load(x_ptr, offset, reads, live) - shift[:, None], 0.0)
        d1 += d
        d2 += d * d
        if t_ptr is not None:
            t = tl.where(live, _load(t_ptr, offset, reads, live) - t_shift[:, None], 0.0)
            t1 += t
            td += t * d
    off = tl.sum(d1, axis=1) / k
    _store_partial(partial_ptr, 0, shift + off, c, C)
    _store_partial(partial_ptr, 1, tl.sum(d2, axis=1) - k * off * off, c, C)
    if t_ptr is not None:
        t_off = tl.sum(t1, axis=1) / k
        _store_partial(partial_ptr, 2, t_shift + t_off, c, C)
        _store_partial(partial_ptr, 3, tl.sum(td, axis=1) - k * off * t_off, c, C)

    if _last_to_arrive(counter_ptr):
        P = tl.num_programs(1)
        known = c < C
        p = tl.arange(0, BP)
        ends = tl.minimum((p + 1) * per, steps)
        sizes = _positions(ends, rows, SPAN, BM, WINDOW, WIDE)
        sizes -= _positions(p * per, rows, SPAN, BM, WINDOW, WIDE)
        sizes = tl.where(p < P, sizes, 0).to(tl.float32)[:, None]
        means = _partials(partial_ptr, 0, c, P, C, BP)
        mean = tl.sum(means * sizes, axis=0) / count
        gaps = tl.where(sizes > 0, means - mean[None, :], 0.0)
        # Chan et al. 1983: within the programs' parts, and between them.
        squares = tl.sum(_partials(partial_ptr, 1, c, P, C, BP) + sizes * gaps * gaps, axis=0)
        if TRAINING:
            centre = mean
            rstd = 1.0 / tl.sqrt(squares / count + eps)
            tl.store(mean_ptr + c, mean, mask=known)
            tl.store(rstd_ptr + c, rstd, mask=known)
            unbiased = squares / (count - 1.0)
            if var_ptr is not None:
                tl.store(var_ptr + c, unbiased, mask=known)
            if running_mean_ptr is not None:
                factor = momentum
                if CUMULATIVE:
                    factor = 1.0 / (tl.load(tracked_ptr) + 1).to(tl.float32)
                _track(running_mean_ptr, mean, c, known, factor)
                _track(running_var_ptr, unbiased, c, known, factor)
        else:
            centre = tl.load(running_mean_ptr + c, mask=known, other=0).to(tl.float32)
            rstd = 1.0 / tl.sqrt(tl.load(running_var_ptr + c, mask=known, other=1).to(tl.float32) + eps)
        if t_ptr is not None:
            # Σg and Σg·(x - μ) of g = 2/N·(γ·(x - μ)·rstd + β - t), from sums alone.
            t_means = _partials(partial_ptr, 2, c, P, C, BP)
            t_mean = tl.sum(t_means * sizes, axis=0) / count
            t_gaps = tl.where(sizes > 0, t_means - t_mean[None, :], 0.0)
            cross = tl.sum(_partials(partial_ptr, 3, c, P, C, BP) + sizes * gaps * t_gaps, axis=0)
            gain = _channel(weight_ptr, c, known, 1.0) * rstd
            level = _channel(bias_ptr, c, known, 0.0) - t_mean
            delta = mean - centre  # 0 in training
            sum_g = error_scale * count * (gain * delta + level)
            sum_gx = error_scale * (gain * (squares + count * delta * delta) + count * level * delta - cross)
            tl.store(sums_ptr + c, sum_g, mask=known)
            tl.store(sums_ptr + C + c, sum_gx, mask=known)
        tl.store(counter_ptr + tl.program_id(0), 0)


@triton.jit(do_not_specialize=["rows", "steps", "per"])
def bn_backward_sums_kernel(
    x_ptr, g_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    sums_ptr, grad_weight_ptr, grad_bias_ptr, partial_ptr, counter_ptr,
    rows, steps, per, scale, eps,
    C: tl.constexpr, SPAN: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    WINDOW: tl.constexpr, WIDE: tl.constexpr, TRAINING: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Σg and Σg·(x - μ) a channel, and with them the gradients of weight and bias."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    known = c < C
    begin = tl.program_id(1) * per
    end = tl.minimum(begin + per, steps)
    mean, rstd = _centre_and_rstd(mean_ptr, rstd_ptr, c, known, eps, TRAINING)
    gain = _channel(weight_ptr, c, known, 1.0) * rstd
    bias = _channel(bias_ptr, c, known, 0.0)
    s1 = tl.zeros([BC, BM], tl.float32)
    s2 = tl.zeros([BC, BM], tl.float32)
    for step in range(begin, end):
        offset, reads, live = _tile(step, c, rows, C, SPAN, BM, WINDOW, WIDE)
        d = tl.where(live, _load(x_ptr, offset, reads, live) - mean[:, None], 0.0)
        g = _load(g_ptr, offset, reads, live)
        if RELU:
            if y_ptr is not None:
                g = tl.where(_load(y_ptr, offset, reads, live) > 0, g, 0.0)
            else:
                g = tl.where(scale * (d * gain[:, None] + bias[:, None]) > 0, g, 0.0)
        s1 += g
        s2 += g * d
    _store_partial(partial_ptr, 0, tl.sum(s1, axis=1), c, C)
    _store_partial(partial_ptr, 1, tl.sum(s2, axis=1), c, C)
    if _last_to_arrive(counter_ptr):
        P = tl.num_programs(1)
        sum_g = scale * tl.sum(_partials(partial_ptr, 0, c, P, C, BP), axis=0)
        sum_gx = scale * tl.sum(_partials(partial_ptr, 1, c, P, C, BP), axis=0)
        tl.store(sums_ptr + c, sum_g, mask=known)
        tl.store(sums_ptr + C + c, sum_gx, mask=known)
        if grad_weight_ptr is not None:
            tl.store(grad_weight_ptr + c, (sum_gx * rstd).to(grad_weight_ptr.dtype.element_ty), mask=known)
        if grad_bias_ptr is not None:
            tl.store(grad_bias_ptr + c, sum_g.to(grad_bias_ptr.dtype.element_ty), mask=known)
        tl.store(counter_ptr + tl.program_id(0), 0)


@triton.jit
def _centre_and_rstd(mean_ptr, second_ptr, at, live, eps, TRAINING: tl.constexpr):
    """μ and 1/√(σ² + eps): the batch's as they were stored, or from the running ones."""
    mean = tl.load(mean_ptr + at, mask=live, other=0).to(tl.float32)
    second = tl.load(second_ptr + at, mask=live, other=1).to(tl.float32)
    if TRAINING:
        return mean, second
    else:
        return mean, 1.0 / tl.sqrt(second + eps)


@triton.jit
def _columns(W: tl.constexpr, SPAN: tl.constexpr, BW: tl.constexpr, WIDE: tl.constexpr):
    """This program's columns of the matrix ``[rows, W]``, whether they exist, and their channels."""
    BLOCKS: tl.constexpr = (W + BW - 1) // BW
    column = _offset(tl.program_id(0) % BLOCKS, WIDE) * BW + tl.arange(0, BW)
    return column, column < W, column // SPAN, tl.program_id(0) // BLOCKS


@triton.jit(do_not_specialize=["rows", "per"])
def bn_act_kernel(
    x_ptr, r_ptr, y_ptr, mean_ptr, second_ptr, weight_ptr, bias_ptr, tracked_ptr,
    rows, per, scale, carry, eps,
    W: tl.constexpr, SPAN: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
    WIDE: tl.constexpr, TRAINING: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """y = act(scale·BN(x) + carry·r) of some columns and rows; what is known of a channel is loaded once."""
    column, live, channel, group = _columns(W, SPAN, BW, WIDE)
    mean, rstd = _centre_and_rstd(mean_ptr, second_ptr, channel, live, eps, TRAINING)
    gain = scale * _channel(weight_ptr, channel, live, 1.0) * rstd
    bias = scale * _channel(bias_ptr, channel, live, 0.0)
    begin = group * per
    for start in range(begin, tl.minimum(begin + per, rows), BR):
        row = _offset(start + tl.arange(0, BR), WIDE)
        mask = (row < rows)[:, None] & live[None, :]
        at = row[:, None] * W + column[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
        y = (x - mean[None, :]) * gain[None, :] + bias[None, :]
        if r_ptr is not None:
            y += carry * tl.load(r_ptr + at, mask=mask, other=0).to(tl.float32)
        if RELU:
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if tracked_ptr is not None:
        # Here and not in the statistics' launch, where other programs still read it.
        if tl.program_id(0) == 0:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


@triton.jit(do_not_specialize=["rows", "per"])
def bn_act_backward_kernel(
    x_ptr, g_ptr, y_ptr, gx_ptr, gr_ptr, mean_ptr, second_ptr, weight_ptr, bias_ptr, sums_ptr,
    rows, per, scale, carry, inverse_count, eps,
    C: tl.constexpr, W: tl.constexpr, SPAN: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
    WIDE: tl.constexpr, TRAINING: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """gx = γ·rstd·(g - Σg/n - (x - μ)·rstd²·Σg·(x - μ)/n), and gr = carry·g, g behind the activation."""
    column, live, channel, group = _columns(W, SPAN, BW, WIDE)
    if gx_ptr is not None or RELU:
        mean, rstd = _centre_and_rstd(mean_ptr, second_ptr, channel, live, eps, TRAINING)
        weight = _channel(weight_ptr, channel, live, 1.0)
        bias = _channel(bias_ptr, channel, live, 0.0)
        gain = weight * rstd
        if TRAINING and gx_ptr is not None:
            level = gain * inverse_count * tl.load(sums_ptr + channel, mask=live, other=0)
            slope = gain * rstd * rstd * inverse_count * tl.load(sums_ptr + C + channel, mask=live, other=0)
    begin = group * per
    for start in range(begin, tl.minimum(begin + per, rows), BR):
        row = _offset(start + tl.arange(0, BR), WIDE)
        mask = (row < rows)[:, None] & live[None, :]
        at = row[:, None] * W + column[None, :]
        g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32)
        if (RELU and y_ptr is None) or (TRAINING and gx_ptr is not None):
            d = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32) - mean[None, :]
        if RELU:
            if y_ptr is not None:
                g = tl.where(tl.load(y_ptr + at, mask=mask, other=0).to(tl.float32) > 0, g, 0.0)
            else:
                g = tl.where(scale * (d * gain[None, :] + bias[None, :]) > 0, g, 0.0)
        if gx_ptr is not None:
            gx = scale * gain[None, :] * g
            if TRAINING:
                gx -= level[None, :] + slope[None, :] * d
            tl.store(gx_ptr + at, gx.to(gx_ptr.dtype.element_ty), mask=mask)
        if gr_ptr is not None:
            tl.store(gr_ptr + at, (carry * g).to(gr_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "per"])
def bn_mse_kernel(
    x_ptr, t_ptr, gx_ptr, grad_weight_ptr, grad_bias_ptr, upstream_ptr,
    mean_ptr, second_ptr, weight_ptr, bias_ptr, sums_ptr, tracked_ptr,
    loss_ptr, partial_ptr, counter_ptr,
    rows, per, inverse_count, error_scale, eps,
    C: tl.constexpr, W: tl.constexpr, SPAN: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, TRAINING: tl.constexpr, EARLY_EXIT: tl.constexpr,
):  # fmt: skip
    """The loss, and the gradients of x, weight and bias with the sums of :func:`bn_statistics_kernel`."""
    upstream = 1.0
    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr).to(tl.float32)
        if EARLY_EXIT:
            if upstream == 1.0:  # the forward launch wrote exactly these gradients
                return
    column, live, channel, group = _columns(W, SPAN, BW, WIDE)
    mean, rstd = _centre_and_rstd(mean_ptr, second_ptr, channel, live, eps, TRAINING)
    gain = _channel(weight_ptr, channel, live, 1.0) * rstd
    bias = _channel(bias_ptr, channel, live, 0.0)
    level = tl.zeros([BW], tl.float32)
    slope = tl.zeros([BW], tl.float32)
    if grad_weight_ptr is not None or grad_bias_ptr is not None or (TRAINING and gx_ptr is not None):
        sum_g = upstream * tl.load(sums_ptr + channel, mask=live, other=0)
        sum_gx = upstream * tl.load(sums_ptr + C + channel, mask=live, other=0)
        first = live & (column % SPAN == 0) & (group == 0)
        if grad_weight_ptr is not None:
            gw = (sum_gx * rstd).to(grad_weight_ptr.dtype.element_ty)
            tl.store(grad_weight_ptr + channel, gw, mask=first)
        if grad_bias_ptr is not None:
            tl.store(grad_bias_ptr + channel, sum_g.to(grad_bias_ptr.dtype.element_ty), mask=first)
        if TRAINING:
            level = gain * inverse_count * sum_g
            slope = gain * rstd * rstd * inverse_count * sum_gx
    total = tl.zeros([BR, BW], tl.float32)
    begin = group * per
    for start in range(begin, tl.minimum(begin + per, rows), BR):
        row = _offset(start + tl.arange(0, BR), WIDE)
        mask = (row < rows)[:, None] & live[None, :]
        at = row[:, None] * W + column[None, :]
        d = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32) - mean[None, :]
        t = tl.load(t_ptr + at, mask=mask, other=0).to(tl.float32)
        error = d * gain[None, :] + bias[None, :] - t
        total += tl.where(mask, error * error, 0.0)
        if gx_ptr is not None:
            gx = upstream * error_scale * gain[None, :] * error
            if TRAINING:
                gx -= level[None, :] + slope[None, :] * d
            tl.store(gx_ptr + at, gx.to(gx_ptr.dtype.element_ty), mask=mask)
    if tracked_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    if loss_ptr is not None:
        share = tl.sum(tl.sum(total, axis=1), axis=0) * (0.5 * error_scale)
        reduce_last(share, loss_ptr, partial_ptr, counter_ptr, BP)
