"""Standard normals from Philox counters, without the slow path of the library's trigonometry.

Element e of step t under a key is lane e mod 4 of Philox-4x32-10 (Salmon et al. 2011) at the counter
(⌊e/4⌋ low, ⌊e/4⌋ high, t, 0): it depends on nothing else, neither layout nor launch. Lanes pair up
(Box & Muller 1958), with u in (0, 1) and k a 32-bit integer:

    r = √(-2 ln u),   θ = 2π·k/2³²,   (n₀, n₁) = (r·cos θ, r·sin θ)

ln is a polynomial on [√½, √2) after taking the exponent off; the top bits of k choose the quadrant, so the
sine and cosine polynomials see |θ| ≤ π/4 only. Error against exact mathematics on the same integers: under
3e-7 relative to max(1, |n|).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sign import negative


@triton.jit
def _log(u):
    """Natural logarithm of positive, normal float32."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # so that the mantissa lies in [√½, √2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = -0.081015572 * f + 0.127123073
    p = p * f - 0.129722387
    p = p * f + 0.142021745
    p = p * f - 0.166422471
    p = p * f + 0.200014681
    p = p * f - 0.250002980
    p = p * f + 0.333333284
    return exponent.to(tl.float32) * 0.693147181 + (f - f * f * (0.5 - f * p))


@triton.jit
def _pair(i, k):
    """Two independent normals from two independent 32-bit integers."""
    u = (i.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    r = tl.sqrt(-2.0 * tl.minimum(_log(u), 0.0))
    quadrant = (k + 0x20000000) >> 30
    theta = (k - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    w = theta * theta
    sine = theta + theta * w * (-0.166666642 + w * (0.008332748 - w * 0.000195879))
    cosine = 1.0 - 0.5 * w + w * w * (0.041666664 + w * (-0.00138883 + w * 2.4547580e-05))
    odd = (quadrant & 1) == 1
    swapped_cos = tl.where(odd, sine, cosine)
    swapped_sin = tl.where(odd, cosine, sine)
    cos_sign = tl.where((quadrant == 1) | (quadrant == 2), negative(r), r)
    sin_sign = tl.where(quadrant >= 2, negative(r), r)
    return cos_sign * swapped_cos, sin_sign * swapped_sin


@triton.jit
def normals4(seed, step, group):
    """The four normals of each ``group`` (int32 or int64 tensor): elements 4·group … 4·group + 3."""
    low = group.to(tl.uint32)
    high = (group.to(tl.int64) >> 32).to(tl.uint32)
    word = tl.full(group.shape, 0, tl.uint32) + step.to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, word, low * 0)
    n0, n1 = _pair(a, b)
    n2, n3 = _pair(c, d)
    return n0, n1, n2, n3


@triton.jit
def normal_at(seed, step, element):
    """The normal of each ``element``, in any order: four times the work of :func:`normals4`."""
    n0, n1, n2, n3 = normals4(seed, step, element >> 2)
    lane = element & 3
    return tl.where(lane < 2, tl.where(lane == 0, n0, n1), tl.where(lane == 2, n2, n3))


@triton.jit
def normals_of_groups(seed, step, groups, BLOCK: tl.constexpr):
    """The normals of BLOCK / 4 ``groups``, one group after another."""
    n0, n1, n2, n3 = normals4(seed, step, groups)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])


@triton.jit
def normal_run(seed, step, first, BLOCK: tl.constexpr):
    """The normals of elements ``first … first + BLOCK - 1``, where 4 divides ``first`` and BLOCK."""
    return normals_of_groups(seed, step, first // 4 + tl.arange(0, BLOCK // 4), BLOCK)


@triton.jit
def normal_rows(seeds, step, first, numel, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """As :func:`normal_run`, but every ROW elements (a multiple of 4) start afresh under the next of ``seeds``."""
    element = first + 4 * tl.arange(0, BLOCK // 4)
    own = element // ROW
    key = tl.load(seeds + own, mask=element < numel, other=0).to(tl.uint64)
    return normals_of_groups(key, step, (element - own * ROW) // 4, BLOCK)
