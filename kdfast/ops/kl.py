"""The KL op, with or without hard labels, and the statistics of the same pass; see common/row_loss.py."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kdfast.ops.common.closed import ClosedRows
from kdfast.ops.common.gradients import Value, join_value, split_value, takes_reference
from kdfast.ops.common.registered import registered_op
from kdfast.ops.common.row_loss import Launcher, Row, launches, register
from kdfast.reference import kl as reference
from kdfast.reference.common import compute_dtype

__all__ = ["distillation", "is_counted", "kd_statistics", "kl", "launches"]


def _labels(row: Row) -> reference.Labels | None:
    if row.label is None:
        return None
    factor = row.factor
    if len(row.options) > 1:
        factor = _factors(row)
    assert factor is not None
    return reference.Labels(row.label, factor, row.second, row.second_factor, row.options[0])


def _factors(row: Row) -> torch.Tensor:
    """Each row's factor, of what :data:`distillation` says, as the kernel finds it itself."""
    _, weight, ignore, counted = row.options
    assert row.label is not None
    counts = row.label != int(ignore)
    count = row.factor if counted != 2 else counts.sum(dtype=torch.float32)
    if count is None:
        return counts.float() * weight
    return counts * (weight / count.clamp(min=1.0))


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels import kl

    return kl


def is_counted(labels: torch.Tensor) -> bool:
    """Whether the kernel counts them itself, where :func:`launches` has said that one runs."""
    most: int = _kernels().MOST_COUNTED
    return labels.numel() <= most


def _launch(_: torch.Tensor, __: torch.Tensor, row: Row) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    kernels = _kernels()
    if row.label is None:
        return kernels.PLAIN, (), ()
    label, factor, second, second_factor = row[7:]
    if len(row.options) > 1:
        smoothing, weight, ignore, counted = row.options
        only = label, factor, None, None, smoothing, weight
        return kernels.LABELS, only, (1, int(ignore), int(counted))
    further = (label, factor, second, second_factor, row.options[0], 0.0)
    return kernels.LABELS, further, (1 if second is None else 2, None, 0)


def _reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    factors = row.temperature, row.dim, row.weight, row.mask, row.divisor, row.reduce
    return reference.kd_kl(student, teacher, *factors, _labels(row))


def _reference_gradients(
    upstream: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, row: Row
) -> tuple[torch.Tensor, torch.Tensor]:
    factors = row.temperature, row.dim, row.weight, row.mask, row.divisor
    return reference.kd_kl_gradients(upstream, student, teacher, *factors, _labels(row))


def _closed(row: Row) -> ClosedRows | None:
    if row.label is not None:
        return None
    return lambda s, t, *needs: reference.kd_kl_closed(s, t, row.temperature, row.dim, *needs)


#: T²·w·KL of each row over the divisor; no options.
kl = register("kd_kl", _reference, Launcher(_launch), _closed, _reference_gradients)
#: With w times a cross-entropy: of ``label`` and ``second``, weighed by their factors; smoothing is the one option. On
#: the Triton backend three more may follow, a weight, a class that is ignored, and what that is divided by: 0 nothing,
#: 1 ``factor``, 0-d, 2 how many labels are another. Then a row's factor is that where its label is another.
distillation = register("distillation", _reference, Launcher(_launch), None, _reference_gradients)


def kd_statistics(
    student: torch.Tensor, teacher: torch.Tensor, temperature: Value, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL without T², teacher's class, its probability at T = 1, agreement) of each row; no gradient."""
    if student.requires_grad or teacher.requires_grad:
        student, teacher = student.detach(), teacher.detach()
    if not torch.compiler.is_compiling():
        return _statistics(student, teacher, temperature, dim)
    found: tuple[torch.Tensor, ...] = kd_statistics_op(student, teacher, *split_value(temperature), dim)
    kl, teacher_class, probability, agreement = found
    return kl, teacher_class, probability, agreement


def _statistics(
    student: torch.Tensor, teacher: torch.Tensor, temperature: Value, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Below autograd and the dispatcher: the reference, or one launch."""
    if takes_reference(student, teacher):
        return reference.kd_statistics(student, teacher, temperature, dim)
    kernels, device = _kernels(), student.device
    shape = student.shape[:dim] + student.shape[dim + 1 :]
    probability = torch.empty(shape, dtype=torch.float32, device=device)
    statistics = (
        torch.empty(shape, dtype=torch.int64, device=device),
        probability,
        torch.empty(shape, dtype=torch.bool, device=device),
    )
    # The kernel's factor is T² over a divisor: T² takes it away again.
    scale = kernels.Scale(temperature, temperature * temperature, None, None)
    reads, rows = (student, teacher), kernels.Wanted(True, False)
    kl: torch.Tensor = kernels.STATISTICS(reads, (None, None), dim, scale, rows, None, statistics, fresh=True)
    return (kl, *statistics)


@registered_op("kd_statistics")
def kd_statistics_op(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    temperature_tensor: torch.Tensor | None,
    dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``kdfast::kd_statistics``: KL, the teacher's class, its probability, agreement."""
    return _statistics(student, teacher, join_value(temperature, temperature_tensor), dim)


@kd_statistics_op.register_fake
def _(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, temperature_tensor: Any, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = student.shape[:dim] + student.shape[dim + 1 :]
    value = student.new_empty(shape, dtype=compute_dtype(student, teacher))
    return (
        value,
        student.new_empty(shape, dtype=torch.int64),
        torch.empty_like(value),
        student.new_empty(shape, dtype=torch.bool),
    )
