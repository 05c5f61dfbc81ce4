"""JSD, decoupled KD, cached top-k teachers, DIST: the oracle of the tests, and the path for CPU and float64."""

from __future__ import annotations

import math

import torch

from kdfast.reference.losses import NEAR, compute_dtype, kd_kl_rows

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
        odds = scaled.gather(dim, index).squeeze(dim) - torch.logsumexp(others, dim)
        return others, torch.stack([odds, torch.zeros_like(odds)], -1)

    s_others, s_binary = split(student)
    t_others, t_binary = split(teacher)
    return alpha * kd_kl_rows(s_binary, t_binary, 1.0, -1) + beta * kd_kl_rows(s_others, t_others, 1.0, dim)


def topk_rows(
    student: torch.Tensor,
    index: torch.Tensor,
    logits: torch.Tensor,
    normalizer: torch.Tensor | None,
    bucket: bool,
    temperature: torch.Tensor | float,
) -> torch.Tensor:
    """KL over the k kept classes and, for ``bucket``, all others as one outcome; without the factor T²."""
    dtype = compute_dtype(student)
    present = (index >= 0) & (logits > -math.inf)
    safe = index.clamp(min=0)
    scaled = student.to(dtype) / temperature
    kept = (logits.to(dtype) / temperature).masked_fill(~present, -math.inf)
    if not bucket:
        return kd_kl_rows(scaled.gather(-1, safe).masked_fill(~present, -math.inf), kept, 1.0, -1)
    log_p = torch.log_softmax(kept, -1) if normalizer is None else kept - normalizer.to(dtype).unsqueeze(-1)
    chosen = torch.zeros(student.shape, dtype=torch.int64, device=student.device)
    chosen = chosen.scatter_add(-1, safe, present.long()) > 0
    total = torch.logsumexp(scaled, -1, keepdim=True)
    # Not below the rounding of 1, as in the kernel: there is no other class left, or as good as none.
    rounding = torch.finfo(dtype).eps / 2
    none_left = chosen.all(-1)
    others = scaled.masked_fill(chosen & ~none_left.unsqueeze(-1), -math.inf)
    q_other = (
        (torch.logsumexp(others, -1) - total.squeeze(-1))
        .exp()
        .masked_fill(none_left, 0.0)
        .clamp(min=rounding)
    )
    p_other = torch.zeros_like(q_other) if normalizer is None else (1 - log_p.exp().sum(-1)).clamp(min=0.0)
    log_q = (scaled.gather(-1, safe) - total).masked_fill(~present, 0.0)
    p, q = log_p.exp(), log_q.exp().masked_fill(~present, 0.0)
    terms = _kl_terms(p, q, log_p.masked_fill(~present, 0.0) - log_q, present).sum(-1)
    ratio = torch.where(p_other > 0, p_other, q_other) / q_other
    return terms + _kl_terms(p_other, q_other, ratio.log(), p_other > 0)


def _kl_terms(p: torch.Tensor, q: torch.Tensor, delta: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """p·δ + (q - p), summed so that near-equal p and q do not cancel; δ = log p - log q."""
    near = (delta.detach().abs() < NEAR) & present
    small = torch.where(near, delta, torch.zeros_like(delta))
    return torch.where(near, p * (small + torch.special.expm1(-small)), p * delta + (q - p))


#: ε of DIST's correlations, as its authors have it.
DIST_EPS = 1e-8


def dist(
    student: torch.Tensor, teacher: torch.Tensor, beta: float, gamma: float, temperature: torch.Tensor | float
) -> torch.Tensor:
    """T²·(β·inter + γ·intra) of logits ``[..., V]`` (Huang et al. 2022, Eq. 9); every leading index is a sample."""
    dtype = compute_dtype(student, teacher)
    q, p = (torch.softmax(x.to(dtype).flatten(0, -2) / temperature, -1) for x in (student, teacher))

    def distance(dim: int) -> torch.Tensor:
        a, b = q - q.mean(dim, keepdim=True), p - p.mean(dim, keepdim=True)
        norms = a.norm(dim=dim) * b.norm(dim=dim)
        similar: torch.Tensor = (a * b).sum(dim) / (norms + DIST_EPS)
        return (1 - similar).mean()

    return (beta * distance(1) + gamma * distance(0)) * (temperature * temperature)


def finish(
    rows: torch.Tensor,
    temperature: torch.Tensor | float,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: torch.Tensor | float,
    reduce: bool,
) -> torch.Tensor:
    """T²·weight/divisor times each row, 0 where the mask is False; summed to a 0-d tensor when ``reduce``."""
    rows = rows * (temperature * temperature)
    if row_weight is not None:
        rows = rows * row_weight.to(rows.dtype)
    if mask is not None:
        rows = rows.masked_fill(~mask, 0.0)
    rows = rows / divisor
    return rows.sum() if reduce else rows


def without_masked(mask: torch.Tensor | None, dim: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same logits with rows that do not count set to 0: whatever they hold, nothing comes of it."""
    if mask is None:
        return tensors
    drop = ~mask.unsqueeze(dim)
    return tuple(tensor.masked_fill(drop, 0.0) for tensor in tensors)
