"""What the bodies of the KL kernels share: row factors, the term that does not cancel, the store of a gradient."""

import triton
import triton.language as tl


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
def scalar(value, ptr, FROM_MEMORY: tl.constexpr):
    """A launch argument, or the same from device memory so that a graph replay sees its current value."""
    if FROM_MEMORY:
        out = tl.load(ptr).to(tl.float32)
    else:
        out = value
    return out


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
def store_gradient(ptrs, grad, keep, live, MASK: tl.constexpr):
    """Store ``grad`` where ``live``, 0 in rows that the mask drops."""
    if MASK:
        grad = tl.where(keep, grad, 0.0)
    tl.store(ptrs, grad.to(ptrs.dtype.element_ty), mask=live)
