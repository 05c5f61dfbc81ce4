"""Functions that procedural images are made of; kdfast/reference/procedural/arithmetic.py says
the same, operation by operation.

Division and square root are the correctly rounded ones and nothing may be contracted to a fused multiply-add: an
image is then the same bits as on a CPU, and chaotic folds do not drift apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.sign import negative

LIMIT = tl.constexpr(8192.0)


@triton.jit
def wave(turns):
    """sin(2π·turns), to 6e-7."""
    u = turns - tl.floor(turns + 0.5)
    a = tl.abs(u)
    f = tl.minimum(a, 0.5 - a)
    w = f * f
    s = f * (w * (w * (w * -70.99356555 + 81.34078436) + -41.33714291) + 6.28316405)
    return tl.where(u < 0, negative(s), s)


@triton.jit
def turns_of(x, y):
    """atan2(y, x)/2π in (−½, ½], to 2e-6; 0 at the origin."""
    ax, ay = tl.abs(x), tl.abs(y)
    a = tl.div_rn(tl.minimum(ax, ay), tl.maximum(tl.maximum(ax, ay), 1e-12))
    w = a * a
    t = a * (w * (w * (w * (w * 0.00331759 + -0.01355304) + 0.02867325) + -0.05256965) + 0.15913367)
    t = tl.where(ay > ax, 0.25 - t, t)
    t = tl.where(x < 0, 0.5 - t, t)
    return tl.where(y < 0, negative(t), t)


@triton.jit
def log2(x):
    """Base-2 logarithm of positive, normal numbers, to 1e-5."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    f = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    p = f * -0.03538527 + 0.14840927
    p = p * f + -0.30511895
    p = p * f + 0.46991958
    p = p * f + -0.72051966
    p = p * f + 1.4426848
    return exponent.to(tl.float32) + f * p


@triton.jit
def length(x, y):
    """√(x² + y²)."""
    return tl.sqrt_rn(x * x + y * y)


@triton.jit
def rotate(x, y, sine, cosine):
    """(x, y) turned by an angle given by its sine and cosine."""
    return cosine * x - sine * y, sine * x + cosine * y


@triton.jit
def limit(x):
    """Kept within ±LIMIT."""
    return tl.minimum(tl.maximum(x, -LIMIT), LIMIT)


@triton.jit
def between(x, low, high):
    """Kept within [low, high]."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def lattice_hash(ix, iy, seed):
    """32 well-mixed bits (int32) for each lattice point and seed."""
    h = ix * 0x27D4EB2D + iy * 0x165667B1 + seed
    h = (h ^ ((h >> 15) & 0x1FFFF)) * 0x2C1B3C6D
    h = (h ^ ((h >> 12) & 0xFFFFF)) * 0x297A2D39
    return h ^ ((h >> 15) & 0x1FFFF)


@triton.jit
def unit_low(h):
    """The lower 16 bits as a number in [0, 1)."""
    return (h & 0xFFFF).to(tl.float32) * 0.0000152587890625


@triton.jit
def unit_high(h):
    """The upper 16 bits as a number in [0, 1)."""
    return ((h >> 16) & 0xFFFF).to(tl.float32) * 0.0000152587890625


@triton.jit
def _blend(a, b, c, d, u, v):
    top = a + (b - a) * u
    bottom = c + (d - c) * u
    return top + (bottom - top) * v


@triton.jit
def value_noise(x, y, seed):
    """Two independent smooth fields in [0, 1): hashed lattice values, blended by 3u² − 2u³."""
    fx, fy = tl.floor(x), tl.floor(y)
    ix, iy = fx.to(tl.int32), fy.to(tl.int32)
    u, v = x - fx, y - fy
    u = u * u * (3.0 - 2.0 * u)
    v = v * v * (3.0 - 2.0 * v)
    a, b = lattice_hash(ix, iy, seed), lattice_hash(ix + 1, iy, seed)
    c, d = lattice_hash(ix, iy + 1, seed), lattice_hash(ix + 1, iy + 1, seed)
    first = _blend(unit_low(a), unit_low(b), unit_low(c), unit_low(d), u, v)
    second = _blend(unit_high(a), unit_high(b), unit_high(c), unit_high(d), u, v)
    return first, second
