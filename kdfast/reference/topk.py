"""KL to a cached top-k teacher: the oracle of the tests, and the path for CPU and float64."""

from __future__ import annotations

import math

import torch

from kdfast.reference.common import NEAR, compute_dtype
from kdfast.reference.kl import kd_kl_rows

__all__ = ["first_of_equals", "topk_rows"]


def first_of_equals(index: torch.Tensor) -> torch.Tensor:
    """False where a row ``[..., k]`` has named the same class before."""
    order = index.argsort(dim=-1, stable=True)
    in_order = index.gather(-1, order)
    again = torch.zeros_like(index, dtype=torch.bool)
    again[..., 1:] = in_order[..., 1:] == in_order[..., :-1]
    return torch.ones_like(again).scatter(-1, order, ~again)


def topk_rows(
    student: torch.Tensor,
    index: torch.Tensor,
    logits: torch.Tensor,
    normalizer: torch.Tensor | None,
    bucket: bool,
    temperature: torch.Tensor | float,
) -> torch.Tensor:
    """KL over the k kept classes and, for ``bucket``, all others as one outcome; without the factor T².

    An index outside 0 … V - 1 and a logit of -inf are padding, a class counts the first time that it is named, and a
    row that names none is 0.
    """
    dtype = compute_dtype(student)
    present = (index >= 0) & (index < student.shape[-1]) & (logits != -math.inf)
    present = present & first_of_equals(index.masked_fill(~present, -1))
    named = present.any(-1)
    safe = index.masked_fill(~present, 0)
    drop = ~named.unsqueeze(-1)  # before anything is computed: 0 times NaN would come back as a gradient
    student, logits = student.masked_fill(drop, 0.0), logits.masked_fill(drop, 0.0)
    rows = _rows(student, safe, present | drop, logits, normalizer, bucket, temperature, dtype)
    return rows.masked_fill(~named, 0.0)


def _rows(
    student: torch.Tensor,
    safe: torch.Tensor,
    present: torch.Tensor,
    logits: torch.Tensor,
    normalizer: torch.Tensor | None,
    bucket: bool,
    temperature: torch.Tensor | float,
    dtype: torch.dtype,
) -> torch.Tensor:
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
