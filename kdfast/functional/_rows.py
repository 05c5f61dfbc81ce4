"""What every loss of two logit tensors asks of its arguments, at once where they are as nearly always."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kdfast.functional._checks import (
    COLDEST,
    HOTTEST,
    REDUCTIONS,
    check_dim,
    check_labels,
    check_logits,
    check_reduction,
    check_rowwise,
    check_temperature,
    on_host,
    savable,
)
from kdfast.ops.common.gradients import is_compiling
from kdfast.reference.native import extension

__all__ = ["agree", "check_row_labels", "check_rows", "labelled", "listed"]


Look = Callable[[tuple[Any, ...], tuple[Any, ...]], bool]


def _unknown(tensors: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Without the extension nothing is known at once."""
    return False


def _looks() -> tuple[Look, Look, Look]:
    native = extension()
    if native is None:
        return _unknown, _unknown, _unknown
    made: tuple[Look, Look, Look] = native.agreement_of(torch.Tensor, torch.nn.Parameter)
    return made


#: ``agree(whole, channels)``: are tensors dense, of floating point and on one device, ``whole`` of one shape, and
#: ``channels`` (tensors or None) of one value a channel, its second dimension? ``labelled((logits, labels), (axis,))``:
#: are there int64 labels, one a row over that dimension from 0? ``listed((logits, indices, values), ())``: are there
#: int64 indices and values of floating point, as many of both a row over the last dimension, at least one? False where
#: a tensor is of another class or without memory of its own: the checks one by one decide then, and say what is wrong.
#: No trace can look into any of them.
agree, labelled, listed = _looks()


def check_rows(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float | torch.Tensor,
    dim: int,
    reduction: str,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[int, float | torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The arguments that all losses of rows share: (class dimension from 0, temperature, row weight, mask)."""
    if (
        row_weight is None
        and mask is None
        and not is_compiling()
        and type(temperature) is float
        and COLDEST <= temperature <= HOTTEST
        and type(dim) is int
        and type(reduction) is str
        and reduction in REDUCTIONS
        and agree((student, teacher), ())
        and -(dims := student.dim()) <= dim < dims
    ):
        return dim % dims, temperature, None, None
    check_reduction(reduction)
    check_logits(student, teacher)
    axis = check_dim(dim, student)
    temperature = check_temperature(temperature, student)
    if row_weight is not None or mask is not None:
        rows = student.shape[:axis] + student.shape[axis + 1 :]
        row_weight = check_rowwise("row_weight", row_weight, rows, student)
        mask = check_rowwise("mask", mask, rows, student)
    return axis, temperature, row_weight, mask


def check_row_labels(
    name: str, labels: torch.Tensor | None, axis: int, ignore_index: int, logits: torch.Tensor
) -> torch.Tensor | None:
    """:func:`check_labels` of one a row of ``logits``, whose class dimension is ``axis`` from 0."""
    if (
        not is_compiling()
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and labelled((logits, labels), (axis,))
        and labels is not None
        and not on_host(labels)
    ):
        return savable(labels) if labels.is_inference() else labels
    shape = logits.shape
    rows = shape[:axis] + shape[axis + 1 :]
    return check_labels(name, labels, rows, shape[axis], ignore_index, logits)
