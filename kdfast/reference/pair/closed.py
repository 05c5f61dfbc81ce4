"""JSD and decoupled KD with their gradients in closed form: the same numbers as rows.py, in fewer passes.

What CPU tensors take, as kl/closed.py is for the KL divergence; the JSD in one loop of csrc/jsd_loop.hpp where the
extension was built. Rows whose student and teacher nearly agree, or that hold -inf, are computed again in float64,
where what cancels leaves enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

from kdfast.reference.closed import CAREFUL_BELOW, Closed, closed_form, log_softmax_at, looped_form
from kdfast.reference.pair.rows import LOWEST

#: Below this share of one side the divergence to the mixture cancels in float32 whatever the row: no closed form.
LEAST_BETA = 0.05

Into = torch.Tensor | None
Temperature = torch.Tensor | float
Where = slice | torch.Tensor


def jsd_closed(
    student: torch.Tensor,
    teacher: torch.Tensor,
    beta: float,
    temperature: Temperature,
    dim: int,
    need_student: bool,
    need_teacher: bool,
) -> Closed:
    """β·KL(p ‖ M) + (1-β)·KL(q ‖ M) of each row, and T times its gradients where they are needed.

    With a = log(p/M) and b = log(q/M), M = β·p + (1-β)·q:

        T·∂/∂t = β·p·(a - Σ p·a)        T·∂/∂s = (1-β)·q·(b - Σ q·b)

    since the terms through M cancel.
    """

    def compute(mixture: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def rows(s: torch.Tensor, t: torch.Tensor, where: Where, grad_s: Into, grad_t: Into) -> torch.Tensor:
            return _jsd(s, t, beta, temperature, grad_s, grad_t, mixture)

        return rows

    need, loop = (need_student, need_teacher), ("jsd_rows", temperature, (beta,))
    return looped_form(student, teacher, dim, need, loop, compute(_mixture), compute(_careful_mixture))


def _mixture(
    log_p: torch.Tensor, log_q: torch.Tensor, p: torch.Tensor, q: torch.Tensor, beta: float
) -> torch.Tensor:
    return (p * beta).add_(q, alpha=1 - beta).log_()


def _careful_mixture(
    log_p: torch.Tensor, log_q: torch.Tensor, p: torch.Tensor, q: torch.Tensor, beta: float
) -> torch.Tensor:
    for log in (log_p, log_q):
        log.clamp_(min=LOWEST)
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _jsd(
    s: torch.Tensor,
    t: torch.Tensor,
    beta: float,
    temperature: Temperature,
    grad_s: Into,
    grad_t: Into,
    mixture: Callable[..., torch.Tensor],
) -> torch.Tensor:
    log_q, q = log_softmax_at(s, temperature)
    log_p, p = log_softmax_at(t, temperature)
    for log, own in ((log_q, q), (log_p, p)):
        torch.exp(log, out=own)
    log_m = mixture(log_p, log_q, p, q, beta)
    ratio_p, ratio_q = log_p.sub_(log_m), log_q.sub_(log_m)
    sides = []
    for own, ratio, share, grad in ((p, ratio_p, beta, grad_t), (q, ratio_q, 1 - beta, grad_s)):
        loss = torch.mul(own, ratio, out=log_m).sum(-1)
        if grad is not None:
            torch.sub(ratio, loss.unsqueeze(-1), out=grad).mul_(own).mul_(share)
        sides.append(loss.mul_(share))
    return sides[0].add_(sides[1])


def dkd_closed(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    alpha: float,
    beta: float,
    temperature: Temperature,
    dim: int,
    need_student: bool,
    need_teacher: bool,
) -> Closed:
    """α·TCKD + β·NCKD of each row (Zhao et al. 2022, Eq. 7), and T times its gradients where they are needed.

    With p̂, q̂ over the classes other than the target y, odds o = logit_y/T - logsumexp(the others/T), σ(o) the
    target's probability and δ = log p̂ - log q̂, for the classes c other than y:

        T·∂/∂s_c = β·(q̂ - p̂) - A·q̂,          T·∂/∂s_y = A,  A = α·(σ(o_s) - σ(o_t))
        T·∂/∂t_c = β·p̂·(δ - Σ p̂·δ) - B·p̂,    T·∂/∂t_y = B,  B = α·σ(o_t)·σ(-o_t)·(o_t - o_s)
    """
    at_target = target.reshape(-1, 1)

    def rows(s: torch.Tensor, t: torch.Tensor, where: Where, grad_s: Into, grad_t: Into) -> torch.Tensor:
        return _dkd(s, t, at_target[where], (alpha, beta), temperature, grad_s, grad_t)

    return closed_form(
        student,
        teacher,
        dim,
        (need_student, need_teacher),
        rows,
        rows,
        below=(alpha + beta) * CAREFUL_BELOW,
    )


def _dkd(
    s: torch.Tensor,
    t: torch.Tensor,
    at_target: torch.Tensor,
    weights: tuple[float, float],
    temperature: Temperature,
    grad_s: Into,
    grad_t: Into,
) -> torch.Tensor:
    alpha, beta = weights
    log_q, odds_s, q = _others(s, at_target, temperature)
    log_p, odds_t, p = _others(t, at_target, temperature)
    torch.exp(log_p, out=p)
    delta = log_p.sub_(log_q).masked_fill_(p == 0, 0.0)  # the target, and absent classes: 0·inf counts as 0
    others = torch.mul(p, delta, out=q).sum(-1, keepdim=True)
    hit, miss = odds_t.sigmoid(), (-odds_t).sigmoid()
    own = hit * (logsigmoid(odds_t) - logsigmoid(odds_s))
    own += miss * (logsigmoid(-odds_t) - logsigmoid(-odds_s))
    if grad_t is not None:
        through = alpha * hit * miss * (odds_t - odds_s)
        torch.sub(delta, others, out=grad_t).mul_(beta).sub_(through).mul_(p)
        grad_t.scatter_(-1, at_target, through)
    if grad_s is not None:
        through = alpha * (odds_s.sigmoid() - hit)
        torch.exp(log_q, out=grad_s).mul_(beta - through).sub_(p, alpha=beta)
        grad_s.scatter_(-1, at_target, through)
    return own.mul_(alpha).add_(others, alpha=beta).squeeze(-1)


def _others(
    logits: torch.Tensor, at_target: torch.Tensor, temperature: Temperature
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-softmax of the classes other than the target's, the target's odds against all of them ``[n, 1]``, memory."""
    scaled = logits / temperature
    own = scaled.gather(-1, at_target)
    scaled.scatter_(-1, at_target, -math.inf)
    largest, place = scaled.max(-1, keepdim=True)
    log = torch.log_softmax(scaled, -1)
    # log-sum-exp = a logit minus its log-probability; the largest loses least.
    odds = own - (largest - log.gather(-1, place))
    return log, odds.masked_fill_(~odds.isfinite(), math.nan), scaled  # as rows.py has it
