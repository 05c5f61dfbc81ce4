"""Bodies of the denoising-step kernels; equations, traffic and launch plans: the package."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.normal import normal_at, normal_rows, normal_run
from ..common.walk import locate, offset_of


@triton.jit
def _guided_lanes(c0, c1, c2, c3, c4, c5, PINNED: tl.constexpr, guided_channels):
    """Whether each lane's channel takes part in guidance."""
    if PINNED == 0:
        return c0 < guided_channels
    elif PINNED == 1:
        return c1 + c0 * 0 < guided_channels
    elif PINNED == 2:
        return c2 + c0 * 0 < guided_channels
    elif PINNED == 3:
        return c3 + c0 * 0 < guided_channels
    elif PINNED == 4:
        return c4 + c0 * 0 < guided_channels
    else:
        return c5 + c0 * 0 < guided_channels


@triton.jit
def _bits(bytes_ptr, start, numel, BLOCK: tl.constexpr):
    """The block's clip mask, one bit an element in iteration order."""
    at = start // 8 + tl.arange(0, BLOCK // 8)
    packed = tl.load(bytes_ptr + at, mask=at * 8 < numel, other=0).to(tl.int32)
    spread = (packed[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(spread, [BLOCK]) != 0


@triton.jit
def _coefficients(table_ptr, step, steps, STEP_ON_DEVICE: tl.constexpr):
    """(step, its row of the table, whether there is one, px, po, a, b, d)."""
    if STEP_ON_DEVICE:
        t = tl.load(step).to(tl.int64)
    else:
        t = step.to(tl.int64)
    # A step outside the table cannot be refused without waiting for the device: its result is NaN.
    known = (t >= 0) & (t < steps)
    row = table_ptr + t * 10
    nan = float("nan")
    px = tl.load(row, mask=known, other=nan)
    po = tl.load(row + 1, mask=known, other=nan)
    a = tl.load(row + 2, mask=known, other=nan)
    b = tl.load(row + 3, mask=known, other=nan)
    d = tl.load(row + 4, mask=known, other=nan)
    return t, row, known, px, po, a, b, d


@triton.jit(do_not_specialize=["step", "seed", "steps"])
def denoise_step_kernel(
    x_ptr, o_ptr, h1_ptr, h2_ptr, h3_ptr, z_ptr, bits_ptr,
    y_ptr, m_ptr, next_ptr, bits_out_ptr, table_ptr,
    step, seed, steps, numel, inner,
    cond_offset, uncond_offset, variance_offset, next_copy_offset,
    guidance, clip, guided_channels,
    X: tl.constexpr, OUT: tl.constexpr, OWN: tl.constexpr,
    H1: tl.constexpr, H2: tl.constexpr, H3: tl.constexpr,
    Z: tl.constexpr, Y: tl.constexpr, M: tl.constexpr, NEXT: tl.constexpr, E: tl.constexpr,
    SIZES: tl.constexpr, NDIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, PINNED: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr,
    HAS_SEED: tl.constexpr, SEED_RUN: tl.constexpr, SEED_ROW: tl.constexpr,
    GUIDED: tl.constexpr, OWN_ROWS: tl.constexpr, CLIP: tl.constexpr, LEARNED: tl.constexpr,
    NEXT_COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y, and what else is asked for, from one read of everything."""
    start, live, column, c0, c1, c2, c3, c4, c5 = locate(numel, inner, SIZES, NDIM, ROWS, WIDE, BLOCK)
    t, row, known, px, po, a, b, d = _coefficients(table_ptr, step, steps, STEP_ON_DEVICE)
    nan = float("nan")

    x = tl.load(x_ptr + offset_of(c0, c1, c2, c3, c4, c5, X, NDIM), mask=live, other=0).to(tl.float32)
    at_o = offset_of(c0, c1, c2, c3, c4, c5, OUT, NDIM)
    if GUIDED:
        if PINNED >= 0:
            guided = _guided_lanes(c0, c1, c2, c3, c4, c5, PINNED, guided_channels)
            u = tl.load(o_ptr + uncond_offset + at_o, mask=live & guided, other=0).to(tl.float32)
            if OWN_ROWS:
                cond = tl.load(o_ptr + cond_offset + at_o, mask=live & guided, other=0).to(tl.float32)
                at_own = offset_of(c0, c1, c2, c3, c4, c5, OWN, NDIM)
                own = tl.load(o_ptr + at_own, mask=live & (guided == 0), other=0).to(tl.float32)
                o = tl.where(guided, u + guidance * (cond - u), own)
            else:
                cond = tl.load(o_ptr + cond_offset + at_o, mask=live, other=0).to(tl.float32)
                o = tl.where(guided, u + guidance * (cond - u), cond)
        else:
            cond = tl.load(o_ptr + cond_offset + at_o, mask=live, other=0).to(tl.float32)
            u = tl.load(o_ptr + uncond_offset + at_o, mask=live, other=0).to(tl.float32)
            o = u + guidance * (cond - u)
    else:
        o = tl.load(o_ptr + at_o, mask=live, other=0).to(tl.float32)

    m = px * x + po * o
    if bits_out_ptr is not None:
        inside = ((m >= -clip) & (m <= clip) & live).to(tl.int32)
        packed = tl.sum(tl.reshape(inside, [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :], axis=1)
        at = start // 8 + tl.arange(0, BLOCK // 8)
        if ROWS:
            fits = column + tl.arange(0, BLOCK // 8) * 8 < inner
        else:
            fits = at * 8 < numel
        tl.store(bits_out_ptr + at, packed.to(tl.uint8), mask=fits)
    if CLIP:
        m = tl.minimum(m, clip, propagate_nan=tl.PropagateNan.ALL)
        m = tl.maximum(m, -clip, propagate_nan=tl.PropagateNan.ALL)
    if bits_ptr is not None:
        m = tl.where(_bits(bits_ptr, start, numel, BLOCK), m, 0.0)
    y = a * x + b * m + d * o
    if h1_ptr is not None:
        h1 = tl.load(h1_ptr + offset_of(c0, c1, c2, c3, c4, c5, H1, NDIM), mask=live, other=0).to(tl.float32)
        y += tl.load(row + 5, mask=known, other=nan) * h1
    if h2_ptr is not None:
        h2 = tl.load(h2_ptr + offset_of(c0, c1, c2, c3, c4, c5, H2, NDIM), mask=live, other=0).to(tl.float32)
        y += tl.load(row + 6, mask=known, other=nan) * h2
    if h3_ptr is not None:
        h3 = tl.load(h3_ptr + offset_of(c0, c1, c2, c3, c4, c5, H3, NDIM), mask=live, other=0).to(tl.float32)
        y += tl.load(row + 7, mask=known, other=nan) * h3

    if z_ptr is not None or HAS_SEED:
        sigma = tl.load(row + 8, mask=known, other=nan)
        if HAS_SEED:
            if SEED_ON_DEVICE:
                key = tl.load(seed).to(tl.uint64)
            else:
                key = seed.to(tl.uint64)
            if SEED_ROW > 0:  # a key for each sample of the batch, whose elements count from its own first
                if SEED_RUN:
                    z = normal_rows(
                        seed, t, offset_of(column, c1, c2, c3, c4, c5, E, NDIM), numel, SEED_ROW, BLOCK
                    )
                else:
                    element = offset_of(c0, c1, c2, c3, c4, c5, E, NDIM)
                    own = element // SEED_ROW
                    keys = tl.load(seed + own, mask=live, other=0).to(tl.uint64)
                    z = normal_at(keys, t, element - own * SEED_ROW)
            elif SEED_RUN:
                z = normal_run(key, t, offset_of(column, c1, c2, c3, c4, c5, E, NDIM), BLOCK)
            else:
                z = normal_at(key, t, offset_of(c0, c1, c2, c3, c4, c5, E, NDIM))
        else:
            z = tl.load(z_ptr + offset_of(c0, c1, c2, c3, c4, c5, Z, NDIM), mask=live, other=0).to(tl.float32)
        if LEARNED:
            # log σ = c + d3·v: the interpolation of log variances (Nichol & Dhariwal 2021, Eq. 15), halved.
            at_v = offset_of(c0, c1, c2, c3, c4, c5, OWN if OWN_ROWS else OUT, NDIM)
            v = tl.load(o_ptr + variance_offset + at_v, mask=live, other=0).to(tl.float32)
            y += tl.exp(sigma + tl.load(row + 7, mask=known, other=nan) * v) * z
        else:
            y += sigma * z

    tl.store(y_ptr + offset_of(c0, c1, c2, c3, c4, c5, Y, NDIM), y.to(y_ptr.dtype.element_ty), mask=live)
    if m_ptr is not None:
        tl.store(m_ptr + offset_of(c0, c1, c2, c3, c4, c5, M, NDIM), m.to(m_ptr.dtype.element_ty), mask=live)
    if next_ptr is not None:
        # From y as it was stored, so that the model sees what a separate pass over y would give.
        stored = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        scaled = (tl.load(row + 9, mask=known, other=nan) * stored).to(next_ptr.dtype.element_ty)
        at_next = next_ptr + offset_of(c0, c1, c2, c3, c4, c5, NEXT, NDIM)
        for copy in tl.static_range(NEXT_COPIES):
            tl.store(at_next + copy * next_copy_offset, scaled, mask=live)


@triton.jit(do_not_specialize=["step", "steps"])
def denoise_step_backward_kernel(
    gy_ptr, gm_ptr, bits_ptr, gx_ptr, go_ptr, table_ptr,
    step, steps, numel, inner, cond_offset, uncond_offset, guidance, guided_channels,
    GY: tl.constexpr, GM: tl.constexpr, GX: tl.constexpr, GO: tl.constexpr,
    SIZES: tl.constexpr, NDIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, PINNED: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr, GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of sample and model output from those of y (and of m), in one pass."""
    start, live, _, c0, c1, c2, c3, c4, c5 = locate(numel, inner, SIZES, NDIM, ROWS, WIDE, BLOCK)
    _, _, _, px, po, a, b, d = _coefficients(table_ptr, step, steps, STEP_ON_DEVICE)

    gy = tl.load(gy_ptr + offset_of(c0, c1, c2, c3, c4, c5, GY, NDIM), mask=live, other=0).to(tl.float32)
    gm = b * gy
    if gm_ptr is not None:
        gm += tl.load(gm_ptr + offset_of(c0, c1, c2, c3, c4, c5, GM, NDIM), mask=live, other=0).to(tl.float32)
    if bits_ptr is not None:
        gm = tl.where(_bits(bits_ptr, start, numel, BLOCK), gm, 0.0)

    if gx_ptr is not None:
        gx = (a * gy + px * gm).to(gx_ptr.dtype.element_ty)
        tl.store(gx_ptr + offset_of(c0, c1, c2, c3, c4, c5, GX, NDIM), gx, mask=live)
    if go_ptr is not None:
        go = d * gy + po * gm
        at_o = offset_of(c0, c1, c2, c3, c4, c5, GO, NDIM)
        if GUIDED:
            to_cond = guidance * go
            to_uncond = (1.0 - guidance) * go
            if PINNED >= 0:
                guided = _guided_lanes(c0, c1, c2, c3, c4, c5, PINNED, guided_channels)
                to_cond = tl.where(guided, to_cond, go)
                to_uncond = tl.where(guided, to_uncond, 0.0)
            tl.store(go_ptr + cond_offset + at_o, to_cond.to(go_ptr.dtype.element_ty), mask=live)
            tl.store(go_ptr + uncond_offset + at_o, to_uncond.to(go_ptr.dtype.element_ty), mask=live)
        else:
            tl.store(go_ptr + at_o, go.to(go_ptr.dtype.element_ty), mask=live)
