"""What JSD and decoupled KD add up, class by class. Equations stand in the package.

Each loss gives, class by class, its term and w = (probability × derivative with respect to it); softmax's
derivative then needs one sum a row: ∂/∂s = (w_s - q·Σw_s)/T and ∂/∂t = (w_t - p·Σw_t)/T. A constant error of
log p - log q (what the two log-sum-exps leave behind) drops out of both.
"""

import triton
import triton.language as tl

from ..common.logarithm import approximate_log2
from ..common.rows import near_terms
from ..common.sign import negative
from ..common.tile import per_row
from .divergences import divergence_terms, log1p_series, series


@triton.jit
def clamped_gap(s, t, k, shift, log_ratio, KIND: tl.constexpr):
    """log2 p - log2 q, finite where a class is absent and p = 0 multiplies it; for JSD, where q = 0 does, too.

    Divergences look at what is absent themselves: ±inf, and 0 where it is absent on both sides.
    """
    if KIND >= 2:
        # The two largest logits go first: nothing is lost where logits are large or the temperature is small.
        gap = ((t - s) - shift) * k - log_ratio
        gap = tl.where(gap == gap, gap, 0.0)
    else:
        gap = tl.maximum((t - s) * k - log_ratio, -1e15)
        if KIND == 0:
            gap = tl.minimum(gap, 1e15)
    return gap


@triton.jit
def exponential(x, largest, top, k, KIND: tl.constexpr):
    """2^(x·k - largest·k); ``top`` is that product, rounded: for a divergence the difference comes first."""
    if KIND >= 2:
        out = tl.exp2((x - largest) * k)
    else:
        out = tl.exp2(x * k - top)
    return out


@triton.jit
def log_probability(x, largest, inverse, k, KIND: tl.constexpr):
    """log2 of the probability of a logit ``x``, for the AB-divergence; the others take no notice of it."""
    out = x
    if KIND == 10:
        out = (x - largest) * k + tl.log2(inverse)
    return out


@triton.jit
def log_ratio_of(s_top, t_top, s_inv, t_sum, KIND: tl.constexpr):
    """What :func:`clamped_gap` takes: the log2-sum-exps' difference, without that of the largest for divergences."""
    if KIND >= 2:
        out = tl.log2(t_sum * s_inv)
    else:
        out = (t_top - s_top) + tl.log2(t_sum * s_inv)
    return out


@triton.jit
def others(ptrs, live, is_target, KIND: tl.constexpr):
    """Logits in float32, for DKD without the target class: masked here, since the load's mask sets its width."""
    out = tl.load(ptrs, mask=live, other=float("-inf")).to(tl.float32)
    if KIND == 1:
        out = tl.where(is_target, float("-inf"), out)
    return out


@triton.jit
def teachers(ptrs, live, is_target, ratio, KIND: tl.constexpr, RATIO: tl.constexpr):
    """:func:`others` of the teacher, in units of the student's temperature where it has one of its own."""
    out = others(ptrs, live, is_target, KIND)
    if RATIO:
        out *= ratio
    return out


@triton.jit
def _mixture_logs(gap, beta):
    """(log2(q/M), log2(p/M)) of the mixture M = β·p + (1-β)·q, from log2(p/q)."""
    rest, other = 1.0 - beta, tl.exp2(negative(tl.abs(gap)))
    # The mixture over what leads. Two results to select from, of which the second is a predicated instruction.
    mixed = tl.where(gap > 0.0, rest * other + beta, beta * other + rest)
    top = approximate_log2(mixed)
    return negative(top + tl.maximum(gap, 0.0)), tl.minimum(gap, 0.0) - top


@triton.jit
def jsd_factors(beta):
    """What :func:`jsd_terms` leaves to be multiplied by, once a row: the weights of q and of p, and ln 2."""
    return (1.0 - beta) * 0.6931471805599453, beta * 0.6931471805599453


@triton.jit
def jsd_terms(gap, p, q, beta):
    """(w_s, w_t) of the generalised Jensen-Shannon divergence, which is their sum, without :func:`jsd_factors`."""
    q_over_m, p_over_m = _mixture_logs(gap, beta)
    return q * q_over_m, p * p_over_m


@triton.jit
def _jsd_near_terms(gap, p, q, present, beta):
    """(term, w_s, w_t) of the generalised Jensen-Shannon divergence, M = β·p + (1-β)·q, where p and q nearly agree."""
    q_over_m, p_over_m = _mixture_logs(gap, beta)
    q_over_m, p_over_m = q_over_m * 0.6931471805599453, p_over_m * 0.6931471805599453
    delta = tl.where(present, gap * 0.6931471805599453, 0.0)
    near = (tl.abs(delta) < 0.5) & present
    delta = tl.where(near, delta, 0.0)
    log1p = log1p_series(beta * (delta + delta * delta * series(delta)))
    q_over_m = tl.where(near, negative(log1p), q_over_m)
    p_over_m = tl.where(near, delta - log1p, p_over_m)
    w_s, w_t = (1.0 - beta) * q * q_over_m, beta * p * p_over_m
    # Their sum cancels; that of β·p·(u + expm1(-u)) and the student's does not, and is the same.
    exact = beta * p * p_over_m * p_over_m * series(negative(p_over_m))
    exact += (1.0 - beta) * q * q_over_m * q_over_m * series(negative(q_over_m))
    return tl.where(near, exact, w_s + w_t), w_s, w_t


@triton.jit
def pair_terms(gap, p, q, log_p, log_q, present, alpha, beta, KIND: tl.constexpr, NEAR: tl.constexpr):
    """(term, w_s, w_t) of JSD (KIND 0), of KL (KIND 1, for DKD), of the others; ``beta`` is the loss's number.

    JSD's are those of rows that nearly agree: :func:`jsd_terms` has the others.
    """
    if KIND == 0:
        term, w_s, w_t = _jsd_near_terms(gap, p, q, present, beta)
    elif KIND >= 2:
        term, w_s, w_t = divergence_terms(gap, p, q, log_p, log_q, alpha, beta, KIND, NEAR)
    elif NEAR:
        term, w_s, delta = near_terms(gap, p, q, present)
        w_t = p * delta
    else:
        w_t = p * gap * 0.6931471805599453
        term, w_s = w_t, q - p
    return term, w_s, w_t


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - 0.6931471805599453 * tl.log2(1.0 + tl.exp2(-tl.abs(x) * 1.4426950408889634))


@triton.jit
def binary_terms(s_odds, t_odds):
    """KL of target class against all others, and its derivatives with respect to the two log-odds."""
    # A target that is absent, or not a number: no divergence is finite, and NaN says so in loss and gradients.
    s_odds = tl.where(tl.abs(s_odds) < float("inf"), s_odds, float("nan"))
    t_odds = tl.where(tl.abs(t_odds) < float("inf"), t_odds, float("nan"))
    s_in, t_in = _log_sigmoid(s_odds), _log_sigmoid(t_odds)
    s_out, t_out = _log_sigmoid(-s_odds), _log_sigmoid(-t_odds)
    b_s, b_t = tl.exp2(s_in * 1.4426950408889634), tl.exp2(t_in * 1.4426950408889634)
    c_s, c_t = tl.exp2(s_out * 1.4426950408889634), tl.exp2(t_out * 1.4426950408889634)
    always = b_t >= 0.0
    term_in, _, _ = near_terms((t_in - s_in) * 1.4426950408889634, b_t, b_s, always)
    term_out, _, _ = near_terms((t_out - s_out) * 1.4426950408889634, c_t, c_s, always)
    by_student = tl.where(b_s > 0.5, c_t - c_s, b_s - b_t)  # the smaller pair keeps its digits
    return term_in + term_out, by_student, b_t * c_t * (t_odds - s_odds)


@triton.jit
def odds(logits, at, known, k, top, total):
    """Log-odds of the target class against the others, whose log2-sum-exp is ``top + log2(total)``.

    NaN where the target is not ``known``: no class, and nothing is read.
    """
    logit = tl.load(logits + at, mask=known, other=float("nan")).to(tl.float32)
    return (logit * k - top - tl.log2(total)) * 0.6931471805599453


@triton.jit
def near_bound(KIND: tl.constexpr):
    """Below this divergence its digits have cancelled, and the forms that do not cancel are taken.

    An absolute difference (7) cancels earlier than a squared one; JSD's logarithms are right to 2e-7. The AB-divergence
    (10) takes those forms in every row.
    """
    if KIND == 7:
        bound = 0.03
    elif KIND == 0:
        bound = 4e-3
    elif KIND == 10:
        bound = 0.0
    else:
        bound = 1e-3
    return bound


@triton.jit
def row_gradient(counts, scale, inv_t, log_ratio):
    """What multiplies a row's gradient: 0 where it does not count, NaN where a logit is (log_ratio holds them all)."""
    g = tl.where(log_ratio == log_ratio, scale * inv_t, float("nan"))
    return tl.where(counts, g, 0.0)


@triton.jit
def pair_gradient(
    w, total, prob, scale, divergence_weight, odds_slope, is_target, LAYOUT: tl.constexpr, KIND: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """∂loss/∂logit of a tile: the softmax's derivative, and for DKD the target class's share, unless APART."""
    grad = w - prob * per_row(total, LAYOUT)
    if KIND == 1:
        grad = divergence_weight * grad - prob * per_row(odds_slope, LAYOUT)
        if not APART:
            grad = tl.where(is_target, per_row(odds_slope, LAYOUT), grad)
    return grad * per_row(scale, LAYOUT)
