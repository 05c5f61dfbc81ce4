"""Body of the cached top-k loss. Equations, bytes and launch plan stand in the package."""

import triton
import triton.language as tl

from ..common.rows import finished, in_strides, load_logits, near_terms, no_logits, row_scale, store_gradient
from ..common.tile import store_losses
from ..common.vectors import block_classes, block_logits, more_of_vector, scaled


@triton.jit
def _more(
    peak, acc, row, stride, start, k, V: tl.constexpr,
    THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(peak, sum) a thread with BLOCKS more blocks, all of them asked for before one is worked on."""
    classes = start + block_classes(THREADS, VECTOR, ALONG)
    s = ()
    for block in tl.static_range(BLOCKS):
        at = classes + block * THREADS * VECTOR
        s += (block_logits(row + at.to(tl.int64) * stride, at, V, WHOLE),)
    for block in tl.static_range(BLOCKS):
        peak, acc = more_of_vector(peak, acc, s[block], k, ALONG, True)
    return peak, acc


@triton.jit
def _store_rest(
    gs_row, gs_stride, row, stride, start, k, log_sum, g, counts, V: tl.constexpr, THREADS: tl.constexpr,
    VECTOR: tl.constexpr, ALONG: tl.constexpr, BLOCKS: tl.constexpr, BUCKET: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCKS blocks' classes as if none of them had been kept."""
    for block in tl.static_range(BLOCKS):
        classes = start + block * THREADS * VECTOR + block_classes(THREADS, VECTOR, ALONG)
        grad = tl.zeros(classes.shape, tl.float32)
        if BUCKET:
            x = block_logits(row + classes.to(tl.int64) * stride, classes, V, WHOLE)
            grad = g * tl.exp2(x * k - log_sum)
        live = None if WHOLE else classes < V
        store_gradient(gs_row + classes.to(tl.int64) * gs_stride, grad, counts, live, BUCKET)


@triton.jit
def topk_kernel(
    s_ptr, gs_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr,
    num_rows, inner, s_outer, s_inner, s_class, gs_outer, gs_inner, gs_class, index_ptr, logit_ptr, normalizer_ptr,
    V: tl.constexpr, UNIT: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr, BLOCKS: tl.constexpr,
    BUCKET: tl.constexpr, ONCE: tl.constexpr, NORMALIZER: tl.constexpr, T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr,
    GRAD_S: tl.constexpr, STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """One row a program: its log-sum-exp, the k outcomes and the bucket, then the gradient."""
    if finished(upstream_ptr, EARLY_EXIT):
        return
    row = tl.program_id(0)
    outer, within = in_strides(row // inner, row % inner, UNIT)
    scale, counts, inv_t, k = row_scale(
        row, row < num_rows, temperature, temperature_ptr, divisor, divisor_ptr, weight_ptr, mask_ptr, upstream_ptr,
        T_PTR, DIVISOR_PTR, WEIGHT, MASK, UPSTREAM,
    )  # fmt: skip
    s_row = s_ptr + outer * s_outer + within * s_inner

    # The k outcomes. A negative index is padding, and so is a logit of -inf.
    lane = tl.arange(0, WIDE)
    at = tl.cast(row, tl.int64) * K + lane
    index = tl.load(index_ptr + at, mask=lane < K, other=-1)
    inside = (index >= 0) & (index < V)
    t = tl.load(logit_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    present = inside & (t != float("-inf"))
    if ONCE:
        # A class counts where it is named first: the padding gets names that nothing else has. In 32 bits all pairs
        # take 64 registers of sm_90, in 64 they take 78.
        name = tl.where(present, index.to(tl.int32), -1 - lane)
        before = (name[:, None] == name[None, :]) & (lane[None, :] < lane[:, None])
        present = present & (tl.max(before.to(tl.int32), axis=1) == 0)
    named = tl.max(present.to(tl.int32), axis=0) > 0  # a row that names no class adds nothing
    counts = counts & named
    t = tl.where(present | (named == 0), t, float("-inf"))
    x = load_logits(s_row, index, s_class, present)
    t_top = tl.max(t, axis=0) * k
    if NORMALIZER:
        t_log = t * k - tl.load(normalizer_ptr + row).to(tl.float32) * 1.4426950408889634
    else:
        t_log = t * k - t_top - tl.log2(tl.sum(tl.exp2(t * k - t_top), axis=0))
    p = tl.exp2(t_log)

    whole: tl.constexpr = V // (BLOCKS * THREADS * VECTOR) * (BLOCKS * THREADS * VECTOR)
    if BUCKET:
        peak, acc = no_logits([THREADS])
        for start in range(0, whole, BLOCKS * THREADS * VECTOR):
            peak, acc = _more(
                peak, acc, s_row, s_class, start, k, V, THREADS, VECTOR, ALONG, BLOCKS, True
            )  # fmt: skip
        if whole < V:
            peak, acc = _more(
                peak, acc, s_row, s_class, whole, k, V, THREADS, VECTOR, ALONG, BLOCKS, False
            )  # fmt: skip
        top = scaled(tl.max(peak, axis=0), k)
        log_sum = top + tl.log2(tl.sum(acc * tl.exp2(scaled(peak, k) - top), axis=0))
    else:
        top = tl.max(x, axis=0) * k
        log_sum = top + tl.log2(tl.sum(tl.exp2(x * k - top), axis=0))
    s_log = x * k - log_sum
    q = tl.exp2(s_log)

    gap = tl.maximum(t_log - s_log, -1e15)
    term, difference, _ = near_terms(gap, p, q, present)
    loss = tl.sum(tl.where(present, term, 0.0), axis=0)
    slope = 0.0
    if BUCKET:
        # Not below the rounding of 1: a mass that fp32 cannot tell from 0 has no logarithm worth having.
        q_other = tl.maximum(1.0 - tl.sum(tl.where(present, q, 0.0), axis=0), 5.9604645e-8)
        p_other = q_other * 0.0
        if NORMALIZER:
            p_other = tl.maximum(1.0 - tl.sum(tl.where(present, p, 0.0), axis=0), 0.0)
        log_p = tl.log2(tl.maximum(p_other, 1e-30))
        other, _, _ = near_terms(log_p - tl.log2(q_other), p_other, q_other, p_other > 0.0)
        loss += other
        slope = 1.0 - p_other / q_other
    g = tl.where(counts, scale * inv_t, 0.0)
    if GRAD_S:
        gs_row = gs_ptr + outer * gs_outer + within * gs_inner
        for start in range(0, whole, BLOCKS * THREADS * VECTOR):
            _store_rest(
                gs_row, gs_class, s_row, s_class, start, k, log_sum, g * slope, counts, V,
                THREADS, VECTOR, ALONG, BLOCKS, BUCKET, True,
            )  # fmt: skip
        if whole < V:
            _store_rest(
                gs_row, gs_class, s_row, s_class, whole, k, log_sum, g * slope, counts, V,
                THREADS, VECTOR, ALONG, BLOCKS, BUCKET, False,
            )  # fmt: skip
        tl.debug_barrier()  # the k classes are written again, by other threads
        grad = tl.where(counts, g * difference, 0.0)
        tl.store(gs_row + index * gs_class, grad.to(gs_ptr.dtype.element_ty), mask=present)
    loss = tl.where(counts, scale * loss, 0.0)
    store_losses(loss, row, None, rows_ptr, loss_ptr, partial_ptr, counter_ptr, STORE_ROWS, REDUCE, True)
