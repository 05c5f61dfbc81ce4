"""Bodies of the noising kernels; equations, traffic and launch plans: noise.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.across import locate_across, normal_across
from ..common.normal import normal_at, normal_run
from ..common.reduce import reduce_last
from ..common.walk import offset_of, window
from .bodies import key_of, normals, place


@triton.jit(do_not_specialize=["seed", "inverse_n"])
def noise_mse_kernel(
    p_ptr, grad_ptr, upstream_ptr, loss_ptr, partial_ptr, counter_ptr, seed, numel, inner, inverse_n,
    P: tl.constexpr, GRAD: tl.constexpr, E: tl.constexpr,
    SIZES: tl.constexpr, NDIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    NOISE_RUN: tl.constexpr, TILE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, EARLY_EXIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The squared error against normals that are drawn here, and its gradient."""
    factor = 2.0 * inverse_n
    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr).to(tl.float32)
        if EARLY_EXIT:
            if upstream == 1.0:  # the forward launch wrote exactly this gradient
                return
        factor *= upstream
    live, f0, f1, c0, c1, c2, c3, c4, c5 = place(numel, inner, SIZES, NDIM, ROWS, WIDE, TILE, BLOCK)
    p = tl.load(p_ptr + offset_of(c0, c1, c2, c3, c4, c5, P, NDIM), mask=live, other=0).to(tl.float32)
    step = tl.full([], 0, tl.int64)
    key = key_of(seed, SEED_ON_DEVICE)
    e = normals(key, step, 0, f0, f1, c0, c1, c2, c3, c4, c5, E, NDIM, NOISE_RUN, TILE, BLOCK)
    error = tl.where(live, p - e, 0.0)
    if grad_ptr is not None:
        at = offset_of(c0, c1, c2, c3, c4, c5, GRAD, NDIM)
        tl.store(grad_ptr + at, (factor * error).to(grad_ptr.dtype.element_ty), mask=live)
    if loss_ptr is not None:
        reduce_last(tl.sum(error * error) * inverse_n, loss_ptr, partial_ptr, counter_ptr, 1024)


@triton.jit(do_not_specialize=["seed", "batch", "steps", "rows"])
def add_noise_embed_kernel(
    x_ptr, t_ptr, table_ptr, e_ptr, out_ptr, seed, batch, steps, rows,
    C: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr,
    NOISE_RUN: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """√ᾱ_t·x + √(1-ᾱ_t)·ε + E[t] of one block of a sample, for every sample that this program has."""
    W: tl.constexpr = C * SPAN
    WIDE: tl.constexpr = W >= 2147418112  # of one sample: 2³¹, less what a last block may reach beyond it
    if TILE is None:
        first = tl.program_id(0)
        if WIDE:
            first = first.to(tl.int64)
        first *= BLOCK
        at = first + tl.arange(0, BLOCK)
        live = at < W
        channel = at // SPAN
    else:
        live, f0, f1, channel, position, _, _, _, _ = locate_across((C, 1, 1, 1, 1, 1), 2, WIDE, TILE, BLOCK)
        first = f0 * SPAN + f1  # in row-major order, whatever the layout
        at = position * C + channel
    key = key_of(seed, SEED_ON_DEVICE)
    step = tl.full([], 0, tl.int64)
    for b in range(tl.program_id(1), batch, tl.num_programs(1)):
        sample = tl.full([], 0, tl.int64) + b
        t = tl.load(t_ptr + sample).to(tl.int64)
        # A timestep outside the tables cannot be refused without waiting for the device: NaN.
        known = (t >= 0) & (t < steps)
        bar = tl.load(table_ptr + t, mask=known, other=float("nan"))
        if NOISE_RUN:
            e = normal_run(key, step, sample * W + first, BLOCK)
        elif TILE is not None:
            e = normal_across(key, step, sample * W + first, TILE, BLOCK)
        else:
            e = normal_at(key, step, sample * W + at)
        x = tl.load(x_ptr + sample * W + at, mask=live, other=0).to(tl.float32)
        out = tl.sqrt(bar) * x + tl.sqrt(1.0 - bar) * e
        if e_ptr is not None:
            held = live & (t >= 0) & (t < rows)
            out += tl.load(e_ptr + t * C + channel, mask=held, other=float("nan")).to(tl.float32)
        tl.store(out_ptr + sample * W + at, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["batch", "rows"])
def embedding_gradient_kernel(
    g_ptr, t_ptr, grad_ptr, batch, rows,
    C: tl.constexpr, SPAN: tl.constexpr, LAST: tl.constexpr,
    BC: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Σ of g over all samples of one timestep and all their positions, by the first sample that has it."""
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    first = tl.program_id(0) // BLOCKS
    t = tl.load(t_ptr + first)
    if (t < 0) | (t >= rows):
        return
    c = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    lanes = tl.arange(0, BM)
    row_at = c
    if WIDE:
        row_at, lanes = row_at.to(tl.int64), lanes.to(tl.int64)
    total = tl.zeros([BC, BM], tl.float32)
    # BB timesteps at once, then from one sample that has this one to the next; nothing where an earlier one has it.
    own = True
    for start in range(0, batch, BB):
        at = start + tl.arange(0, BB)
        shares = tl.load(t_ptr + at, mask=at < batch, other=-1) == t
        b = tl.min(tl.where(shares, at, batch), axis=0)
        own = own & (b >= first)
        b = tl.where(own, b, batch)
        while b < batch:
            base = (b.to(tl.int64) if WIDE else b) * (C * SPAN)
            for begin in range(0, SPAN, BM):
                if WINDOW:
                    offset, reads, live = window(row_at, lanes, C, SPAN)
                else:
                    s = begin + lanes
                    offset = s[None, :] * C + row_at[:, None] if LAST else row_at[:, None] * SPAN + s[None, :]
                    live = (c < C)[:, None] & (s < SPAN)[None, :]
                    reads = live
                g = tl.load(g_ptr + base + offset, mask=reads, other=0).to(tl.float32)
                total += tl.where(live, g, 0.0)
            b = tl.min(tl.where(shares & (at > b), at, batch), axis=0)
    row = tl.sum(total, axis=1).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + t.to(tl.int64) * C + c, row, mask=(c < C) & own)
