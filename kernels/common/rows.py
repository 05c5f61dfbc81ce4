"""What bodies over rows of logits share: where rows begin, their factors, log-sum-exps as they are read, the term
that does not cancel, the store of a gradient.
"""

import triton
import triton.language as tl

from .sign import negative


@triton.jit
def gap_of(s, t, k, log_ratio):
    """log2 p - log2 q. Logits are subtracted before anything is scaled: exact when they are close.

    A class that is absent in the teacher gives a huge finite number instead of -inf (or of NaN, when it is
    absent in both): what follows multiplies it by p = 0, and 0·inf would be NaN.
    """
    return tl.maximum((t - s) * k - log_ratio, -1e30)


@triton.jit
def near_terms(gap, p, q, present):
    """(p·(δ + expm1(-δ)), p·expm1(-δ), δ), none of which cancels when student and teacher nearly agree."""
    delta = tl.where(present, gap * 0.6931471805599453, 0.0)
    x = negative(delta)
    # A series instead of libdevice's expm1: 8e-7 of h at |x| = 1/2, and it runs in the interpreter.
    h = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040)))))
    near = (tl.abs(delta) < 0.5) & present
    near_term = p * delta * delta * h
    far = q - p
    term = tl.where(near, near_term, p * delta + far)
    difference = tl.where(near, near_term - p * delta, far)
    return term, difference, delta


@triton.jit
def scalar(value, ptr, FROM_MEMORY: tl.constexpr):
    """A launch argument, or the same from device memory so that a graph replay sees its current value."""
    if FROM_MEMORY:
        out = tl.load(ptr).to(tl.float32)
    else:
        out = value
    return out


@triton.jit
def finished(upstream_ptr, EARLY_EXIT: tl.constexpr):
    """Whether the forward launch has written exactly the gradient that is asked for."""
    done = False
    if EARLY_EXIT:
        done = tl.load(upstream_ptr).to(tl.float32) == 1.0
    return done


@triton.jit
def in_strides(outer, within, UNIT: tl.constexpr):
    """A row's coordinates in 64 bits, the outer one in the units that its strides are given in.

    The unit divides every outer stride: the compiler sees the alignment, and loads stay wide.
    """
    return tl.cast(outer, tl.int64) * UNIT, tl.cast(within, tl.int64)


@triton.jit
def gradient_row(ptr, outer, within, outer_stride, inner_stride, GRAD: tl.constexpr):
    """Where a row of a gradient begins; the pointer itself where none is wanted."""
    row = ptr
    if GRAD:
        row += outer * outer_stride + within * inner_stride
    return row


@triton.jit
def load_logits(row, classes, stride, live):
    """Logits in float32, -inf where not ``live``."""
    return tl.load(row + classes * stride, mask=live, other=float("-inf")).to(tl.float32)


@triton.jit
def no_logits(SHAPE: tl.constexpr):
    """(peak, sum) of a log-sum-exp before its first logit, a lane each.

    The peak is far below any logit, and finite: -inf - -inf would be NaN.
    """
    return tl.full(SHAPE, -1e38, tl.float32), tl.zeros(SHAPE, tl.float32)


@triton.jit
def more_logits(peak, total, x, k):
    """(peak, sum) with one more logit a lane (Milakov & Gimelshein 2018)."""
    new = tl.maximum(peak, x)
    return new, total * tl.exp2((peak - new) * k) + tl.exp2((x - new) * k)


@triton.jit
def more_logits_of_two(s_peak, t_peak, s_total, t_total, s, t, k):
    """:func:`more_logits` of student and teacher, side by side: one after the other takes more registers on sm_100."""
    s_new, t_new = tl.maximum(s_peak, s), tl.maximum(t_peak, t)
    s_total = s_total * tl.exp2((s_peak - s_new) * k) + tl.exp2((s - s_new) * k)
    t_total = t_total * tl.exp2((t_peak - t_new) * k) + tl.exp2((t - t_new) * k)
    return s_new, t_new, s_total, t_total


@triton.jit
def row_factor(rows, valid, weight_ptr, mask_ptr, upstream_ptr, factor,
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
def row_scale(
    rows, valid, temperature, temperature_ptr, divisor, divisor_ptr, weight_ptr, mask_ptr, upstream_ptr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, UPSTREAM: tl.constexpr,
):  # fmt: skip
    """(c of each row with every factor, whether it counts; 1/T; log2(e)/T).

    Powers of two, so that a scaled logit and its exponential are one instruction each.
    """
    T = scalar(temperature, temperature_ptr, T_PTR)
    factor = T * T / scalar(divisor, divisor_ptr, DIVISOR_PTR)
    if UPSTREAM == 1:
        factor *= tl.load(upstream_ptr).to(tl.float32)
    inv_t = 1.0 / T
    scale, counts = row_factor(
        rows, valid, weight_ptr, mask_ptr, upstream_ptr, factor, WEIGHT, MASK, UPSTREAM
    )
    return scale, counts, inv_t, inv_t * 1.4426950408889634


@triton.jit
def unnormalised(s, t, k, s_top, t_top):
    """(log2 of the ratio of p to q, q, p), the latter two without their sums."""
    return gap_of(s, t, k, t_top - s_top), tl.exp2(s * k - s_top), tl.exp2(t * k - t_top)


@triton.jit
def store_gradient(ptrs, grad, keep, live, MASK: tl.constexpr):
    """Store ``grad`` where ``live``, 0 in rows that the mask drops."""
    if MASK:
        grad = tl.where(keep, grad, 0.0)
    tl.store(ptrs, grad.to(ptrs.dtype.element_ty), mask=live)
