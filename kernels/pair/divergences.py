"""What the divergences add up, class by class: (term, w_s, w_t), with w = probability × derivative by it.

p the teacher's and q the student's probability, δ = log(p/q), α the divergence's number, M = α·p + (1-α)·q,
u = log(p/M):

    KIND                     D, each sum over classes of          w_s                    w_t
    2  forward KL            p·δ + (q - p)                        q - p                  p·δ
    3  reverse KL            -q·δ + (p - q)                       -q·δ                   p - q
    4  Jeffreys              (p - q)·δ                            (q - p) - q·δ          (p - q) + p·δ
    5  skew forward KL       p·u + (1-α)·(q - p)                  -(1-α)·q·(p/M - 1)     p·(u - α·(p/M - 1))
    6  skew reverse KL       5 with p and q exchanged
    7  total variation       |p - q|/2                            -sign(p - q)·q/2       sign(p - q)·p/2
    8  α-divergence          (r - α·p - (1-α)·q)/(α·(α-1))        -(r - q)/α             (r - p)/(α-1),  r = p^α·q^(1-α)
    9  triangular            (p - q)·h                            -q·h·(2 + h)           p·h·(2 - h)
   10  AB-divergence         (α·p^λ/λ + β·q^λ/λ - m)/(α·β)        (q^λ - m)/α            (p^λ - m)/β

    with h = (p - q)/(p + q), m = p^α·q^β and λ = α + β

Multiples of q in w_s and of p in w_t drop out of the softmax's derivative, and what is added to a term sums to 0 over a
row: they are chosen so that nothing cancels where |δ| is small (NEAR). A class that both sides rule out has δ = 0 here.
The AB-divergence has neither: a power of a probability may count long after the probability has underflowed, and its
rows may be small because λ is large; it takes logarithms of both, and near forms in every row.
"""

import triton
import triton.language as tl

from ..common.sign import negative


@triton.jit
def series(x):
    """(expm1(x) - x)/x² for |x| < 1/2."""
    return 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040)))))


@triton.jit
def log1p_series(y):
    """log(1 + y) for -0.4 < y < 0.7."""
    z = y / (2.0 + y)
    v = z * z
    return 2.0 * z * (1.0 + v * (1.0 / 3 + v * (1.0 / 5 + v * (1.0 / 7 + v * (1.0 / 9 + v * (1.0 / 11))))))


@triton.jit
def _times(p, delta, gap):
    """p·δ; 0 where p is ruled out, infinite where only the other side is, whatever has underflowed."""
    product = tl.where(gap == float("-inf"), 0.0, p * delta)
    return tl.where(gap == float("inf"), float("inf"), product)


@triton.jit
def _skew(gap, p, q, alpha, NEAR: tl.constexpr):
    """(term, derivative by q, by p) of KL(p ‖ α·p + (1-α)·q)."""
    e = tl.exp2(negative(tl.abs(gap)))
    top = tl.log2(tl.where(gap > 0.0, alpha + (1.0 - alpha) * e, 1.0 - alpha + alpha * e))
    u = (tl.minimum(gap, 0.0) - top) * 0.6931471805599453
    excess = tl.exp2(u * 1.4426950408889634) - 1.0
    # Where p is ruled out, u is -inf and p·u is 0.
    term = tl.where(gap == float("-inf"), 0.0, p * u) + (1.0 - alpha) * (q - p)
    w_p = tl.where(gap == float("-inf"), 0.0, p * (u - alpha * excess))
    w_q = (alpha - 1.0) * q * excess
    if NEAR:
        delta = gap * 0.6931471805599453
        near = tl.abs(delta) < 0.5
        delta = tl.where(near, delta, 0.0)
        small = delta - log1p_series(alpha * (delta + delta * delta * series(delta)))
        excess = small + small * small * series(small)
        term = tl.where(near, p * small * small * series(negative(small)), term)
        w_p = tl.where(near, p * (small - alpha * excess), w_p)
        w_q = tl.where(near, (alpha - 1.0) * q * excess, w_q)
    return term, w_q, w_p


@triton.jit
def _alpha(gap, p, q, alpha, NEAR: tl.constexpr):
    """(term, w_s, w_t) of the α-divergence (Cichocki & Amari 2010, Eq. 15)."""
    beyond = alpha - 1.0
    r = tl.where(
        gap > 0.0, p * tl.exp2(beyond * tl.maximum(gap, 0.0)), q * tl.exp2(alpha * tl.minimum(gap, 0.0))
    )
    term = (r - alpha * p + beyond * q) / (alpha * beyond)
    w_s = (q - r) / alpha
    w_t = (r - p) / beyond
    if NEAR:
        delta = gap * 0.6931471805599453
        near = tl.abs(delta) < 0.25  # α is 2 at most
        delta = tl.where(near, delta, 0.0)
        by_q, by_p = alpha * delta, beyond * delta
        term = tl.where(near, q * delta * delta * (alpha * series(by_q) - series(delta)) / beyond, term)
        w_s = tl.where(near, negative(q) * (by_q + by_q * by_q * series(by_q)) / alpha, w_s)
        w_t = tl.where(near, p * (by_p + by_p * by_p * series(by_p)) / beyond, w_t)
    return term, w_s, w_t


@triton.jit
def _triangular(gap, p, q, NEAR: tl.constexpr):
    """(term, w_s, w_t) of the triangular discrimination (Topsøe 2000)."""
    e = tl.exp2(negative(tl.abs(gap)))
    share = (1.0 - e) / (1.0 + e)
    share = tl.where(gap > 0.0, share, negative(share))
    difference = p - q
    if NEAR:
        delta = gap * 0.6931471805599453
        near = tl.abs(delta) < 0.5
        delta = tl.where(near, delta, 0.0)
        excess = delta + delta * delta * series(delta)  # p/q - 1
        difference = tl.where(near, q * excess, difference)
        share = tl.where(near, excess / (2.0 + excess), share)
    return difference * share, negative(q) * share * (2.0 + share), p * share * (2.0 - share)


@triton.jit
def _ab(gap, log_p, log_q, alpha, beta):
    """(term, w_s, w_t) of the AB-divergence (Cichocki, Cruces & Amari 2011, Eq. 19), from log2 p and log2 q."""
    both = alpha + beta
    p_power, q_power = tl.exp2(both * log_p), tl.exp2(both * log_q)
    mixed = tl.where(
        gap > 0.0,
        p_power * tl.exp2(-beta * tl.maximum(gap, 0.0)),
        q_power * tl.exp2(alpha * tl.minimum(gap, 0.0)),
    )
    term = ((alpha * p_power + beta * q_power) / both - mixed) / (alpha * beta)
    delta = gap * 0.6931471805599453
    near = tl.abs(delta * both) < 0.5
    delta = tl.where(near, delta, 0.0)
    by_q, by_p = alpha * delta, -beta * delta
    small = q_power * delta * delta * (both * series(both * delta) - alpha * series(by_q)) / beta
    w_s = tl.where(near, negative(q_power) * (by_q + by_q * by_q * series(by_q)), q_power - mixed) / alpha
    w_t = tl.where(near, negative(p_power) * (by_p + by_p * by_p * series(by_p)), p_power - mixed) / beta
    return tl.where(near, small, term), w_s, w_t


@triton.jit
def divergence_terms(gap, p, q, log_p, log_q, alpha, beta, KIND: tl.constexpr, NEAR: tl.constexpr):
    """(term, w_s, w_t) of the divergence KIND; gap = log2(p/q), ±inf where one side rules the class out.

    ``beta`` is the number of a divergence that has one; ``alpha``, ``log_p`` and ``log_q`` are the AB-divergence's.
    """
    if KIND == 5:
        term, w_s, w_t = _skew(gap, p, q, beta, NEAR)
    elif KIND == 6:
        term, w_t, w_s = _skew(negative(gap), q, p, beta, NEAR)
    elif KIND == 8:
        term, w_s, w_t = _alpha(gap, p, q, beta, NEAR)
    elif KIND == 9:
        term, w_s, w_t = _triangular(gap, p, q, NEAR)
    elif KIND == 10:
        term, w_s, w_t = _ab(gap, log_p, log_q, alpha, beta)
    else:
        delta = gap * 0.6931471805599453
        difference = q - p
        if NEAR:
            near = tl.abs(delta) < 0.5
            small = tl.where(near, delta, 0.0)
            difference = tl.where(near, p * (small * small * series(negative(small)) - small), difference)
        if KIND == 2:
            w_s, w_t = difference, _times(p, delta, gap)
            term = w_t + difference
            if NEAR:
                term = tl.where(near, p * small * small * series(negative(small)), term)
        elif KIND == 3:
            w_s, w_t = _times(q, negative(delta), negative(gap)), negative(difference)
            term = w_s - difference
            if NEAR:
                term = tl.where(near, q * small * small * series(small), term)
        elif KIND == 4:
            by_p, by_q = _times(p, delta, gap), _times(q, negative(delta), negative(gap))
            w_s, w_t = difference + by_q, by_p - difference
            term = by_p + by_q
            if NEAR:
                term = tl.where(near, negative(difference) * small, term)
        else:
            term = 0.5 * tl.abs(difference)
            half = tl.where(difference > 0.0, 0.5, tl.where(difference < 0.0, -0.5, 0.0))
            w_s, w_t = half * q, negative(half) * p
    return term, w_s, w_t
