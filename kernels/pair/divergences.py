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

Multiples of q in w_s and of p in w_t drop out of the softmax's derivative, and what is added to a term sums to 0 over a
row: they are chosen so that nothing cancels where |δ| is small (NEAR). A class that both sides rule out has δ = 0 here.
"""

import triton
import triton.language as tl


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
    e = tl.exp2(-tl.abs(gap))
    top = tl.log2(tl.where(gap > 0.0, alpha + (1.0 - alpha) * e, 1.0 - alpha + alpha * e))
    u = (tl.minimum(gap, 0.0) - top) * 0.6931471805599453
    excess = tl.exp2(u * 1.4426950408889634) - 1.0
    # Where p is ruled out, u is -inf and p·u is 0.
    term = tl.where(gap == float("-inf"), 0.0, p * u) + (1.0 - alpha) * (q - p)
    w_p = tl.where(gap == float("-inf"), 0.0, p * (u - alpha * excess))
    w_q = -(1.0 - alpha) * q * excess
    if NEAR:
        delta = gap * 0.6931471805599453
        near = tl.abs(delta) < 0.5
        delta = tl.where(near, delta, 0.0)
        small = delta - log1p_series(alpha * (delta + delta * delta * series(delta)))
        excess = small + small * small * series(small)
        term = tl.where(near, p * small * small * series(-small), term)
        w_p = tl.where(near, p * (small - alpha * excess), w_p)
        w_q = tl.where(near, -(1.0 - alpha) * q * excess, w_q)
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
        w_s = tl.where(near, -q * (by_q + by_q * by_q * series(by_q)) / alpha, w_s)
        w_t = tl.where(near, p * (by_p + by_p * by_p * series(by_p)) / beyond, w_t)
    return term, w_s, w_t


@triton.jit
def divergence_terms(gap, p, q, alpha, KIND: tl.constexpr, NEAR: tl.constexpr):
    """(term, w_s, w_t) of the divergence KIND; gap = log2(p/q), ±inf where one side rules the class out."""
    if KIND == 5:
        term, w_s, w_t = _skew(gap, p, q, alpha, NEAR)
    elif KIND == 6:
        term, w_t, w_s = _skew(-gap, q, p, alpha, NEAR)
    elif KIND == 8:
        term, w_s, w_t = _alpha(gap, p, q, alpha, NEAR)
    else:
        delta = gap * 0.6931471805599453
        difference = q - p
        if NEAR:
            near = tl.abs(delta) < 0.5
            small = tl.where(near, delta, 0.0)
            difference = tl.where(near, p * (small * small * series(-small) - small), difference)
        if KIND == 2:
            w_s, w_t = difference, _times(p, delta, gap)
            term = w_t + difference
            if NEAR:
                term = tl.where(near, p * small * small * series(-small), term)
        elif KIND == 3:
            w_s, w_t = _times(q, -delta, -gap), -difference
            term = w_s - difference
            if NEAR:
                term = tl.where(near, q * small * small * series(small), term)
        elif KIND == 4:
            by_p, by_q = _times(p, delta, gap), _times(q, -delta, -gap)
            w_s, w_t = difference + by_q, by_p - difference
            term = by_p + by_q
            if NEAR:
                term = tl.where(near, -difference * small, term)
        else:
            term = 0.5 * tl.abs(difference)
            half = tl.where(difference > 0.0, 0.5, tl.where(difference < 0.0, -0.5, 0.0))
            w_s, w_t = half * q, -half * p
    return term, w_s, w_t
