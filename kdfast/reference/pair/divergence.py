"""Divergences of two softmaxes by their definition, in float64: the oracle of the tests, and the path for CPU tensors.

float64 throughout: what cancels between a student and a teacher that nearly agree then leaves enough for a float32.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from kdfast.reference.common import compute_dtype

__all__ = ["KINDS", "Kind", "divergence_rows"]

#: Names of :func:`kdfast.functional.divergence_loss`.
Kind = Literal[
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "alpha",
    "triangular",
    "ab",
]
#: The same as the kernels count them: JSD, decoupled KD, which is none of these, and the others.
KINDS = ("jsd", "", *(kind for kind in get_args(Kind) if kind != "jsd"))
#: Stands for the logarithm of 0 where it is multiplied by 0.
LEAST = -1e30


def divergence_rows(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str,
    numbers: tuple[float, float],
    temperature: torch.Tensor | float,
    ratio: torch.Tensor | float,
    dim: int,
) -> torch.Tensor:
    """D of each row, without the factor T²; differentiable in both logits, to any order.

    Args:
        student: Logits.
        teacher: Logits of the same shape.
        kind: One of :data:`KINDS`.
        numbers: (α, β): of ``ab`` both; of the others β alone, which is α of the skew divergences and of ``alpha``.
        temperature: T of the student.
        ratio: T over the teacher's temperature.
        dim: The class dimension, which is summed out.
    """
    dtype = compute_dtype(student, teacher)
    if student.shape[dim] == 0:
        return (student + teacher).sum(dim, dtype=dtype)
    log_q, log_p = (
        _log_softmax(student, temperature, dim),
        _log_softmax(teacher.double() * ratio, temperature, dim),
    )
    no_q, no_p = log_q.detach() == -math.inf, log_p.detach() == -math.inf
    q, p = log_q.exp(), log_p.exp()
    log_q, log_p = log_q.masked_fill(no_q, LEAST), log_p.masked_fill(no_p, LEAST)
    terms, infinite = _terms(kind, numbers, log_p, log_q, p, q, no_p & ~no_q, no_q & ~no_p)
    rows = terms.sum(dim)
    if infinite is not None:
        rows = rows.masked_fill(infinite.any(dim), math.inf)
    return rows.to(dtype)


def _log_softmax(logits: torch.Tensor, temperature: torch.Tensor | float, dim: int) -> torch.Tensor:
    return torch.log_softmax(logits.double() / temperature, dim)


def _terms(
    kind: str,
    numbers: tuple[float, float],
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    only_q: torch.Tensor,
    only_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Terms of the sum, and which classes make it infinite."""
    alpha, number = numbers
    if kind == "forward_kl":
        return p * (log_p - log_q), only_p
    if kind == "reverse_kl":
        return q * (log_q - log_p), only_q
    if kind == "jeffreys":
        return (p - q) * (log_p - log_q), only_p | only_q
    if kind == "total_variation":
        return (p - q).abs() / 2, None
    if kind == "skew_forward_kl":
        return p * (log_p - _mixture(log_p, log_q, number)), None
    if kind == "skew_reverse_kl":
        return q * (log_q - _mixture(log_q, log_p, number)), None
    if kind == "jsd":
        log_m = _mixture(log_p, log_q, number)
        return number * p * (log_p - log_m) + (1 - number) * q * (log_q - log_m), None
    if kind == "triangular":
        return (p - q) * ((log_p - log_q) / 2).tanh(), None
    if kind == "ab":
        both = alpha + number
        powers = alpha / both * (both * log_p).exp() + number / both * (both * log_q).exp()
        return (powers - (alpha * log_p + number * log_q).exp()) / (alpha * number), None
    delta = log_p - log_q
    above = p * ((number - 1) * delta.clamp(min=0)).exp()
    below = q * (number * delta.clamp(max=0)).exp()
    power = torch.where(delta > 0, above, below)
    infinite = only_p if number > 1 else only_q if number < 0 else None
    return (power - number * p - (1 - number) * q) / (number * (number - 1)), infinite


def _mixture(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> torch.Tensor:
    """log(share·p + (1 - share)·q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
