"""Distillation losses."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from kdfast.functional._checks import check_dim, check_logits, check_rowwise, check_temperature
from kdfast.ops import losses as _losses

Reduction = Literal["batchmean", "mean", "sum", "none", "rowmean"]

__all__ = ["Reduction", "kd_kl_div"]


def kd_kl_div(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    *,
    dim: int = -1,
    reduction: Reduction = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Temperature-scaled KL divergence from teacher to student, from logits, with both exact gradients.

        T² · Σ_rows w · Σ_c p_c (log p_c - log q_c) / D        p = softmax(t/T), q = softmax(s/T)

    (Hinton et al. 2015, Eq. 4.) The same value as ``F.kl_div(F.log_softmax(student/T, dim),
    F.softmax(teacher/T, dim), reduction=reduction) * T*T`` for the reductions ``sum``, ``mean`` and
    ``batchmean``, in one pass over the logits.

    Args:
        student: Logits, any shape and strides; float32, bfloat16, float16 or float64.
        teacher: Logits of the same shape on the same device; its dtype may differ.
        temperature: T > 0; a float, or a 0-d tensor (read on the device, so that it may change between
            replays of a CUDA graph). Gets no gradient.
        dim: The class dimension.
        reduction: ``"batchmean"`` divides the sum by ``student.size(0)``, ``"mean"`` by the number of
            elements, ``"sum"`` by 1, ``"rowmean"`` by the number of rows whose mask is True; ``"none"`` gives
            one value a row.
        row_weight: A factor a row, of the logits' shape without ``dim``. Gets no gradient.
        mask: bool of that shape; a row where it is False adds nothing and gets no gradient. Only the divisor
            of ``rowmean`` depends on it.

    Returns:
        A 0-d tensor, or for ``"none"`` the logits' shape without ``dim``; float32, float64 when either input
        is. With every row masked it is 0, and so is the gradient.

    Raises:
        TypeError: Logits that are not floating point, a mask that is not bool.
        ValueError: Shapes, devices, ``dim``, ``temperature`` or ``reduction`` out of what is said above.

    Example:
        >>> loss = kd_kl_div(student_logits, teacher_logits, temperature=4.0)
        >>> loss.backward()
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: got {reduction!r}; accepted: {', '.join(get_args(Reduction))}")
    check_logits(student, teacher)
    axis = check_dim(dim, student)
    temperature = check_temperature(temperature, student)
    rows = student.shape[:axis] + student.shape[axis + 1 :]
    row_weight = check_rowwise("row_weight", row_weight, rows, student)
    mask = check_rowwise("mask", mask, rows, student)
    divisor = _divisor(reduction, student, rows, mask)
    return _losses.kd_kl(student, teacher, temperature, axis, row_weight, mask, divisor, reduction != "none")


def _divisor(
    reduction: Reduction, student: torch.Tensor, rows: torch.Size, mask: torch.Tensor | None
) -> float | torch.Tensor:
    if reduction == "batchmean":
        return float(student.shape[0]) or math.nan  # 0/0, as F.kl_div has it
    if reduction == "mean":
        return float(student.numel()) or math.nan
    if reduction == "rowmean":
        # Counted on the device: no host sync. At least 1, so that nothing unmasked means a loss of 0.
        return float(max(1, rows.numel())) if mask is None else mask.sum(dtype=torch.float32).clamp_(min=1.0)
    return 1.0
