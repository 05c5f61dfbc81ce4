"""Powers and rounding on float64 from + − × / alone, line for line csrc/fixed_point.hpp, so that the bits agree."""

from __future__ import annotations

import triton
import triton.language as tl

QUANTUM_MAX = tl.constexpr(4294967295.0)


@triton.jit
def fixed_log2(x):  # type: ignore[no-untyped-def]
    """log₂ of positive float64, in the order of csrc/fixed_point.hpp."""
    bits = x.to(tl.int64, bitcast=True)
    biased = (bits + (0x3FF0000000000000 - 0x3FE6A09E667F3BCD)) >> 52
    m = (bits - (biased << 52) + 0x3FF0000000000000).to(tl.float64, bitcast=True)
    e = (biased - 1023).to(tl.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = z * (1.0 / 21.0) + 1.0 / 19.0
    p = p * z + 1.0 / 17.0
    p = p * z + 1.0 / 15.0
    p = p * z + 1.0 / 13.0
    p = p * z + 1.0 / 11.0
    p = p * z + 1.0 / 9.0
    p = p * z + 1.0 / 7.0
    p = p * z + 1.0 / 5.0
    p = p * z + 1.0 / 3.0
    p = p * z + 1.0
    return tl.where(x > 0.0, e + (s * p) * 2.8853900817779268, -1e300)


@triton.jit
def fixed_exp2(y):  # type: ignore[no-untyped-def]
    """2^y of float64, |y| ≤ 512, in the order of csrc/fixed_point.hpp."""
    shifted = y + 6755399441055744.0
    t = (y - (shifted - 6755399441055744.0)) * 0.6931471805599453
    p = t * (1.0 / 6227020800.0) + 1.0 / 479001600.0
    p = p * t + 1.0 / 39916800.0
    p = p * t + 1.0 / 3628800.0
    p = p * t + 1.0 / 362880.0
    p = p * t + 1.0 / 40320.0
    p = p * t + 1.0 / 5040.0
    p = p * t + 1.0 / 720.0
    p = p * t + 1.0 / 120.0
    p = p * t + 1.0 / 24.0
    p = p * t + 1.0 / 6.0
    p = p * t + 1.0 / 2.0
    p = p * t + 1.0
    p = p * t + 1.0
    return (p.to(tl.int64, bitcast=True) + (shifted.to(tl.int64, bitcast=True) << 52)).to(
        tl.float64, bitcast=True
    )


@triton.jit
def fixed_pow(x, exponent):  # type: ignore[no-untyped-def]
    """x^exponent of positive float64."""
    y = fixed_log2(x) * exponent
    y = tl.where(y > 512.0, 512.0, y)
    y = tl.where(y < -512.0, -512.0, y)
    return fixed_exp2(y)


@triton.jit
def mass_of(magnitude, alpha_bits, eps_bits, scale_bits):  # type: ignore[no-untyped-def]
    """(|δ| + ε)^α · scale in float64, before rounding."""
    alpha = alpha_bits.to(tl.int64).to(tl.float64, bitcast=True)
    eps = eps_bits.to(tl.int64).to(tl.float64, bitcast=True)
    scale = scale_bits.to(tl.int64).to(tl.float64, bitcast=True)
    return fixed_pow(magnitude.to(tl.float64) + eps, alpha) * scale


@triton.jit
def round_mass(mass):  # type: ignore[no-untyped-def]
    """To the nearest integer, ties to even, in [1, 2³² − 1], as int64."""
    # tl.full, since tl.where would round a literal to float32.
    value = tl.where(mass > QUANTUM_MAX, tl.full(mass.shape, 4294967295.0, tl.float64), mass)
    value = tl.where(value < 1.0, 1.0, value)
    return (value + 4503599627370496.0).to(tl.int64, bitcast=True) & 0xFFFFFFFF
