"""Rows that are read in blocks of vectors: a thread takes VECTOR classes at a time.

It keeps one peak for all of them (Milakov & Gimelshein 2018, a vector at a time): one exponential a class and one a
vector, where a peak for each class of a vector takes two a class.
"""

import triton
import triton.language as tl


@triton.jit
def block_classes(THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr):
    """A block's classes: a thread's are neighbours along axis 1 (ALONG = 1: wide loads), or THREADS apart along 0."""
    if ALONG == 1:
        classes = tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    else:
        classes = tl.arange(0, VECTOR)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]
    return classes


@triton.jit
def block_logits(ptrs, classes, V: tl.constexpr, WHOLE: tl.constexpr):
    """A block's logits in float32, -inf behind the last class; WHOLE: all of it is there."""
    if WHOLE:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=classes < V, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def over_vector(v, ALONG: tl.constexpr):
    """One value a thread, for each of its classes."""
    if ALONG == 1:
        out = v[:, None]
    else:
        out = v[None, :]
    return out


@triton.jit
def blocks_of(begin, V: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """(end of the whole blocks, end) of LENGTH classes from ``begin``, counted from there."""
    end = tl.minimum(LENGTH, tl.maximum(V - begin, 0))
    return end // BLOCK * BLOCK, end


@triton.jit
def scaled(peak, k):
    """Where exponents are counted from: fl(k·peak), so that each is one fused multiply-add and the rounding cancels."""
    return tl.maximum(peak * k, -3e38)


@triton.jit
def more_of_vector(peak, total, x, k, ALONG: tl.constexpr, SCALED: tl.constexpr):
    """(peak, sum) of a log-sum-exp with one more vector of logits a thread; SCALED: of 2^(k·x - :func:`scaled`)."""
    new = tl.maximum(peak, tl.max(x, axis=ALONG))
    if SCALED:
        top = scaled(new, k)
        now, before = tl.exp2(x * k - over_vector(top, ALONG)), tl.exp2(scaled(peak, k) - top)
    else:
        now, before = tl.exp2((x - over_vector(new, ALONG)) * k), tl.exp2((peak - new) * k)
    return new, total * before + tl.sum(now, axis=ALONG)
