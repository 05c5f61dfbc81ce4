"""Distillation losses in plain PyTorch: the oracle of the tests and the path for CPU and float64 tensors.

The divergence is accumulated in a form that does not cancel when student and teacher nearly agree, which is
where replay priorities are decided: with δ = log p - log q, every term p·(δ + expm1(-δ)) is ≥ 0 and their sum
equals Σ p·δ, because Σ p·expm1(-δ) = Σ (q - p) = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kdfast.reference.common import NEAR, compute_dtype, finish


class Labels(NamedTuple):
    """Hard labels: ``label`` (int64, one a row) with its ``factor`` in the loss, which is 0 where it is ignored.

    ``second`` and ``second_factor`` are the other label of a mixed sample, or None; ``smoothing`` is the share of
    the target that is spread evenly over all classes.
    """

    label: torch.Tensor
    factor: torch.Tensor
    second: torch.Tensor | None
    second_factor: torch.Tensor | None
    smoothing: float

    def parts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(label, factor) of each label; labels that do not count are 0, so that they can be looked up."""
        both = [(self.label, self.factor)]
        if self.second is not None and self.second_factor is not None:
            both.append((self.second, self.second_factor))
        return [(label.masked_fill(factor == 0, 0), factor) for label, factor in both]


def cross_entropy_rows(student: torch.Tensor, labels: Labels, dim: int) -> torch.Tensor:
    """Each row's cross-entropy at temperature 1, times its factors; exactly 0 where they are 0."""
    parts = labels.parts()
    total = torch.stack([factor for _, factor in parts]).sum(0)
    counts = total != 0
    dtype = compute_dtype(student)
    log_q = torch.log_softmax(student.to(dtype).masked_fill(~counts.unsqueeze(dim), 0.0), dim)
    rows = torch.zeros_like(total, dtype=dtype)
    for label, factor in parts:
        at_label = log_q.gather(dim, label.unsqueeze(dim)).squeeze(dim)
        rows = rows - (1 - labels.smoothing) * factor * at_label.masked_fill(factor == 0, 0.0)
    if labels.smoothing:
        rows = rows - labels.smoothing * total * log_q.mean(dim)
    return rows


def cross_entropy_gradient(student: torch.Tensor, labels: Labels, dim: int) -> torch.Tensor:
    """Of :func:`cross_entropy_rows`, in closed form."""
    parts = labels.parts()
    total = torch.stack([factor for _, factor in parts]).sum(0).unsqueeze(dim)
    dtype = compute_dtype(student)
    q = torch.softmax(student.to(dtype).masked_fill(total == 0, 0.0), dim)
    grad = total.to(dtype) * (q - labels.smoothing / student.shape[dim])
    for label, factor in parts:
        hard = ((1 - labels.smoothing) * factor).to(dtype).unsqueeze(dim)
        grad = grad.scatter_add(dim, label.unsqueeze(dim), -hard)
    return grad


def kd_statistics(
    student: torch.Tensor, teacher: torch.Tensor, temperature: torch.Tensor | float, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL without T², teacher's class, its probability at T = 1, agreement) of each row."""
    kl = kd_kl_rows(student, teacher, temperature, dim)
    wide = teacher.to(compute_dtype(student, teacher))
    probability, teacher_class = torch.softmax(wide, dim).max(dim)
    # Classes from the logits: two that round to one probability are still two logits.
    teacher_class = teacher.argmax(dim)
    return kl, teacher_class, probability, student.argmax(dim) == teacher_class


def kd_kl_rows(
    student: torch.Tensor, teacher: torch.Tensor, temperature: torch.Tensor | float, dim: int
) -> torch.Tensor:
    """KL(softmax(teacher/T) ‖ softmax(student/T)) of each row, without the factor T².

    Differentiable in both logits, to any order. A class whose teacher logit is -inf contributes nothing.

    Args:
        student: Logits, any floating dtype.
        teacher: Logits of the same shape.
        temperature: T, a float or a 0-d tensor.
        dim: The class dimension, which is summed out.

    Returns:
        float32 (float64 for float64 inputs), the logits' shape without ``dim``.
    """
    dtype = compute_dtype(student, teacher)
    log_q = torch.log_softmax(student.to(dtype) / temperature, dim)
    log_p = torch.log_softmax(teacher.to(dtype) / temperature, dim)
    absent = teacher.detach() == float("-inf")
    p, q = log_p.exp(), log_q.exp()
    # Absent classes leave by masked_fill, before any product: 0·inf would be NaN, forward and backward.
    delta = log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)
    near = (delta.detach().abs() < NEAR) & ~absent
    small = torch.where(near, delta, torch.zeros_like(delta))
    terms = torch.where(near, p * (small + torch.special.expm1(-small)), p * delta + (q - p))
    return terms.sum(dim)


def kd_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: torch.Tensor | float,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: torch.Tensor | float,
    reduce: bool,
    labels: Labels | None = None,
) -> torch.Tensor:
    """T²·w·KL of each row, divided by ``divisor``; summed to a 0-d tensor when ``reduce``.

    With ``labels`` each row also has w times its cross-entropy, whose divisor is in their factors.

    A row with ``mask`` False is exactly 0 and passes no gradient, whatever its logits hold.
    """
    # Widened here, once: the two terms' half-precision gradients would otherwise be rounded before they are added.
    student = student.to(compute_dtype(student, teacher))
    if mask is not None:
        keep = mask.unsqueeze(dim)
        student, teacher = (x.masked_fill(~keep, 0.0) for x in (student, teacher))
    rows = kd_kl_rows(student, teacher, temperature, dim)
    distilled = finish(rows, temperature, row_weight, mask, divisor, reduce)
    if labels is None:
        return distilled
    return distilled + finish(cross_entropy_rows(student, labels, dim), 1.0, row_weight, mask, 1.0, reduce)
