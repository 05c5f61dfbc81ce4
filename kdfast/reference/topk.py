"""KL to a cached top-k teacher: the oracle of the tests, and the path for CPU and float64."""

from __future__ import annotations

import math

import torch

from kdfast.reference.common import NEAR, compute_dtype
from kdfast.reference.kl import kd_kl_rows

__all__ = ["topk_rows"]


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
    present = (index >= 0) & (logits != -math.inf)  # NaN is no padding
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
