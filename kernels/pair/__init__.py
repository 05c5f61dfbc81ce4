"""Row losses of two logit tensors on one pass: Jensen-Shannon and nine more divergences, and decoupled KD.

For each row over V classes, p = softmax(t/T), q = softmax(s/T), loss = Σ_rows c·D, c = T²·weight/divisor.

JSD (Agarwal et al. 2024, arXiv:2306.13649, Eq. 1), M = β·p + (1-β)·q, 0 < β < 1:

    D      = β·KL(p ‖ M) + (1-β)·KL(q ‖ M)
    ∂D/∂s  = w_s - q·Σw_s, over T;  w_s = (1-β)·q·log(q/M)          ∂D/∂t likewise, w_t = β·p·log(p/M)

    (β = 0 and β = 1 are KL(p ‖ q) and KL(q ‖ p): the KL kernel runs them.)

DKD (Zhao et al. 2022, arXiv:2203.08679, Eq. 7), y the target class, b = σ(λ) its probability with log-odds
λ = z_y/T - LSE_{c≠y}(z_c/T), p̂ and q̂ the softmaxes over the other classes:

    D      = α·KL([b_t, 1-b_t] ‖ [b_s, 1-b_s]) + β·KL(p̂ ‖ q̂)
    ∂D/∂s  = α·(b_s - b_t) at y,  β·(q̂ - p̂) - α·(b_s - b_t)·q̂ elsewhere, over T
    ∂D/∂t  = α·b_t·(1-b_t)·(λ_t - λ_s) =: a at y,  β·p̂·(log p̂/q̂ - KL) - a·p̂ elsewhere, over T

Reverse KL, Jeffreys, skew KLs, total variation, triangular discrimination, α- and AB-divergence, and each with a
temperature of the teacher's own: the same body with another term, divergences.py.

Bytes moved, N = elements of one logit tensor: 2N for the loss alone, 3N with the student's gradient, 4N with
both, written by the forward launch; a backward whose upstream gradient is 1 moves nothing, otherwise it
recomputes. Rows that do not fit on the chip (V > 8192, with both gradients 4096) are read three times: 4N, 7N, 8N.

Launch plan: as the KL kernel's, with half the elements a thread, since a class's two derivatives live beside its two
probabilities: plan.py. Bodies: tile.py (on the chip), loop.py, terms.py.
"""

from .launch import (
    AB,
    ALPHA,
    DKD,
    FORWARD_KL,
    JEFFREYS,
    JSD,
    PAIR,
    REVERSE_KL,
    SKEW_FORWARD_KL,
    SKEW_REVERSE_KL,
    TOTAL_VARIATION,
    TRIANGULAR,
    pair_arguments,
)

__all__ = [
    "AB",
    "ALPHA",
    "DKD",
    "FORWARD_KL",
    "JEFFREYS",
    "JSD",
    "PAIR",
    "REVERSE_KL",
    "SKEW_FORWARD_KL",
    "SKEW_REVERSE_KL",
    "TOTAL_VARIATION",
    "TRIANGULAR",
    "pair_arguments",
]
