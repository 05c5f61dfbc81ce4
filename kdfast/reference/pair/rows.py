"""JSD and decoupled KD: the oracle of the tests, and the path for CPU and float64."""

from __future__ import annotations

import math

import torch

from kdfast.reference.common import NEAR, compute_dtype
from kdfast.reference.kl.rows import kd_kl_rows

#: Log-probabilities are cut off here: their exponential is 0 in float64 too, and 0 times it is 0.
LOWEST = -1e4


def jsd_rows(
    student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: torch.Tensor | float, dim: int
) -> torch.Tensor:
    """β·KL(p ‖ M) + (1-β)·KL(q ‖ M) of each row, M = β·p + (1-β)·q, 0 < β < 1, without the factor T²."""
    dtype = compute_dtype(student, teacher)
    log_q = torch.log_softmax(student.to(dtype) / temperature, dim).clamp(min=LOWEST)
    log_p = torch.log_softmax(teacher.to(dtype) / temperature, dim).clamp(min=LOWEST)
    p, q = log_p.exp(), log_q.exp()
    delta = log_p - log_q
    near = delta.detach().abs() < NEAR
    small = torch.where(near, delta, torch.zeros_like(delta))
    log1p = torch.log1p(beta * torch.expm1(small))  # log(M/q)
    exact = beta * p * (small - log1p + torch.expm1(log1p - small)) + (1 - beta) * q * (
        torch.expm1(log1p) - log1p
    )
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    far = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
    return torch.where(near, exact, far).sum(dim)


def dkd_rows(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    alpha: float,
    beta: float,
    temperature: torch.Tensor | float,
    dim: int,
) -> torch.Tensor:
    """α·TCKD + β·NCKD of each row (Zhao et al. 2022, Eq. 7), without the factor T²."""
    dtype = compute_dtype(student, teacher)
    index = target.unsqueeze(dim)
    is_target = torch.zeros(student.shape, dtype=torch.bool, device=student.device).scatter(dim, index, True)

    def split(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = logits.to(dtype) / temperature
        others = scaled.masked_fill(is_target, -math.inf)
        odds = _finite(scaled.gather(dim, index).squeeze(dim) - torch.logsumexp(others, dim))
        return others, torch.stack([odds, torch.zeros_like(odds)], -1)

    s_others, s_binary = split(student)
    t_others, t_binary = split(teacher)
    return alpha * kd_kl_rows(s_binary, t_binary, 1.0, -1) + beta * kd_kl_rows(s_others, t_others, 1.0, dim)


def _finite(odds: torch.Tensor) -> torch.Tensor:
    """NaN where a target is absent or not a number: no divergence is finite there, and no gradient right."""
    nan = torch.zeros_like(odds).masked_fill(~odds.isfinite(), math.nan)
    return odds + nan  # whose gradient is the odds' own
