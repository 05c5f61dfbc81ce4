"""Class dimension 1 of [B, C, H, W], few classes: a thread holds whole rows, as tuples of pixels' vectors.

A tuple over classes needs no power of two and no shuffles: nothing is padded, and the sums over the classes are
plain additions. Equations, bytes and launch plans stand in the package.
"""

import triton
import triton.language as tl

from ..common.rows import finished, gap_of, in_strides, near_terms, row_scale, store_gradient, unnormalised
from ..common.tile import pixel_rows, store_losses


@triton.jit
def kd_kl_classes_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr, NEAR: tl.constexpr = True,
):  # fmt: skip
    """One read of each logit, one write of each gradient."""
    if finished(upstream_ptr, EARLY_EXIT):
        return

    rows, valid, outer, within = pixel_rows(inner, PIXELS)
    scale, counts, inv_t, k = row_scale(
        rows, valid, temperature, temperature_ptr, divisor, divisor_ptr, weight_ptr, mask_ptr, upstream_ptr,
        T_PTR, DIVISOR_PTR, WEIGHT, MASK, UPSTREAM,
    )  # fmt: skip
    outer, within = in_strides(outer, within, UNIT)
    s_at = s_ptr + outer * s_outer + within * s_inner
    t_at = t_ptr + outer * t_outer + within * t_inner
    gs_at, gt_at = s_at, t_at
    if GRAD_S:
        gs_at = gs_ptr + outer * gs_outer + within * gs_inner
    if GRAD_T:
        gt_at = gt_ptr + outer * gt_outer + within * gt_inner
    # Steps between classes are 64 bits wide: C·H·W of one image may pass 2³¹.
    s_step, t_step = tl.cast(s_class, tl.int64), tl.cast(t_class, tl.int64)
    gs_step, gt_step = tl.cast(gs_class, tl.int64), tl.cast(gt_class, tl.int64)

    s = ()
    t = ()
    for c in tl.static_range(V):
        s += (tl.load(s_at + c * s_step, mask=valid, other=0.0).to(tl.float32),)
        t += (tl.load(t_at + c * t_step, mask=valid, other=0.0).to(tl.float32),)
    s_top = s[0]
    t_top = t[0]
    for c in tl.static_range(1, V):
        s_top = tl.maximum(s_top, s[c])
        t_top = tl.maximum(t_top, t[c])
    s_top *= k
    t_top *= k

    # q and p, not yet normalised, take the place of the logits; gaps live on only for the teacher's gradient.
    q = ()
    p = ()
    gaps = ()
    s_sum = tl.zeros([PIXELS], tl.float32)
    t_sum = tl.zeros([PIXELS], tl.float32)
    cross = tl.zeros([PIXELS], tl.float32)
    top_ratio = t_top - s_top
    for c in tl.static_range(V):
        gap, q_c, p_c = unnormalised(s[c], t[c], k, s_top, t_top)
        s_sum += q_c
        t_sum += p_c
        cross += p_c * gap
        q += (q_c,)
        p += (p_c,)
        if GRAD_T:
            gaps += (gap,)
    s_inv, t_inv = 1.0 / s_sum, 1.0 / t_sum
    sum_ratio = tl.log2(t_sum * s_inv)
    kl = (cross * t_inv - sum_ratio) * 0.6931471805599453

    g = tl.where(counts, scale * inv_t, 0.0)
    closest = 1.0
    if NEAR:
        closest = tl.min(tl.where(counts, kl, 1.0), axis=0)
    if closest < 1e-3:
        # Some pixel's student and teacher nearly agree, and its digits have cancelled. Reading the pixels again
        # keeps the other branch, the common one, free of registers that live across.
        kl = tl.zeros([PIXELS], tl.float32)
        centre = tl.zeros([PIXELS], tl.float32)
        for j in range(V):
            s_c = tl.load(s_at + j * s_step, mask=valid, other=0.0).to(tl.float32)
            t_c = tl.load(t_at + j * t_step, mask=valid, other=0.0).to(tl.float32)
            gap = gap_of(s_c, t_c, k, top_ratio + sum_ratio)
            term, difference, _ = near_terms(
                gap, tl.exp2(t_c * k - t_top) * t_inv, tl.exp2(s_c * k - s_top) * s_inv, t_c > float("-inf")
            )
            kl += term
            centre += difference
        if GRAD_S or GRAD_T:
            for j in range(V):
                s_c = tl.load(s_at + j * s_step, mask=valid, other=0.0).to(tl.float32)
                t_c = tl.load(t_at + j * t_step, mask=valid, other=0.0).to(tl.float32)
                q_c = tl.exp2(s_c * k - s_top) * s_inv
                p_c = tl.exp2(t_c * k - t_top) * t_inv
                gap = gap_of(s_c, t_c, k, top_ratio + sum_ratio)
                _, difference, delta = near_terms(gap, p_c, q_c, t_c > float("-inf"))
                if GRAD_S:
                    store_gradient(gs_at + j * gs_step, g * (difference - centre * q_c), counts, valid, MASK)
                if GRAD_T:
                    store_gradient(
                        gt_at + j * gt_step, g * p_c * (delta + (centre - kl)), counts, valid, MASK
                    )
    else:
        s_scale, t_scale = g * s_inv, g * t_inv
        for c in tl.static_range(V):
            if GRAD_S:
                store_gradient(gs_at + c * gs_step, q[c] * s_scale - p[c] * t_scale, counts, valid, MASK)
            if GRAD_T:
                delta = (gaps[c] - sum_ratio) * 0.6931471805599453
                store_gradient(gt_at + c * gt_step, p[c] * t_scale * (delta - kl), counts, valid, MASK)
    loss = tl.where(counts, scale * kl, 0.0)
    store_losses(loss, rows, valid, rows_ptr, loss_ptr, partial_ptr, counter_ptr, STORE_ROWS, REDUCE, False)
