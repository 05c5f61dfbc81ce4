"""The KL op, with or without hard labels, and the statistics of the same pass; see common/row_loss.py."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kdfast.ops.common.closed import ClosedRows
from kdfast.ops.common.gradients import Value, join_value, split_value, takes_reference
from kdfast.ops.common.row_loss import Row, register, row_launcher
from kdfast.reference import kl as reference
from kdfast.reference.common import compute_dtype

Labels = reference.Labels

__all__ = ["Labels", "distillation", "kd_kl", "kd_statistics", "kl"]


def _labels(row: Row) -> Labels | None:
    if row.label is None or row.factor is None:
        return None
    return Labels(row.label, row.factor, row.second, row.second_factor, row.options[0])


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels import kl

    return kl


@row_launcher
def _launch(row: Row) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    kernels = _kernels()
    if row.label is None:
        return kernels.PLAIN, (), ()
    labels = kernels.Labels(row.label, row.factor, row.second, row.second_factor, row.options[0])
    return kernels.LABELS, labels, (1 if row.second is None else 2,)


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


kl = register("kd_kl", _reference, _launch, _closed, _reference_gradients)
distillation = register("distillation", _reference, _launch, None, _reference_gradients)


def kd_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: Value,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: Value,
    reduce: bool,
    labels: Labels | None = None,
) -> torch.Tensor:
    """T²·w·KL of each row over ``divisor``, summed when ``reduce``; arguments are checked by the caller.

    Args:
        student: Logits.
        teacher: Logits of the same shape, on the same device.
        temperature: T, a float or a 0-d tensor on the logits' device.
        dim: Class dimension, non-negative.
        row_weight: None, or the logits' shape without ``dim``.
        mask: None, or bool of that shape.
        divisor: A float or a 0-d tensor on the logits' device.
        reduce: Sum the rows.
        labels: Add w times the cross-entropy with these; tensors of one value a row, contiguous.
    """
    row = Row((), dim, temperature, row_weight, mask, divisor, reduce)
    if labels is None:
        return kl(student, teacher, row)
    label, factor, second, second_factor, smoothing = labels
    return distillation(
        student,
        teacher,
        row._replace(
            options=(smoothing,), label=label, factor=factor, second=second, second_factor=second_factor
        ),
    )


def kd_statistics(
    student: torch.Tensor, teacher: torch.Tensor, temperature: Value, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL without T², teacher's class, its probability at T = 1, agreement) of each row; no gradient."""
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
    kernels = _kernels()
    shape = student.shape[:dim] + student.shape[dim + 1 :]
    statistics = kernels.Statistics(
        student.new_empty(shape, dtype=torch.int64),
        student.new_empty(shape, dtype=torch.float32),
        student.new_empty(shape, dtype=torch.bool),
    )
    # The kernel's factor is T² over a divisor: T² takes it away again.
    scale = kernels.Scale(temperature, temperature * temperature, None, None)
    kl: torch.Tensor = kernels.kd_kl(student, teacher, dim, scale, reduce=False, statistics=statistics)
    return (kl, *statistics)


@torch.library.custom_op("kdfast::kd_statistics", mutates_args=())
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
