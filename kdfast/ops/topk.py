"""The KL to a cached top-k teacher as an op: `teacher` is [..., k], `index` its classes, `extra` its log-sum-exp."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kdfast.ops.common.closed import ClosedRows
from kdfast.ops.common.row_loss import Launcher, Row, register
from kdfast.reference import topk as reference
from kdfast.reference.common import finish, without_masked

__all__ = ["topk"]


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels import topk

    return topk


def _arguments(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> tuple[Any, ...]:
    kernels = _kernels()
    # It reads the student alone; of what was kept of the teacher there is no gradient.
    further, options = kernels.topk_arguments(
        student, row.label, teacher.contiguous(), row.factor, row.options[0] != 0.0
    )
    return kernels.TOPK, further, options


def _kept(row: Row) -> reference.Kept:
    assert row.label is not None
    return reference.Kept(row.label, row.factor, bool(row.options[0]))


def _topk_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    (student,) = without_masked(row.mask, row.dim, student)
    rows = reference.topk_rows(student, teacher, _kept(row), row.temperature)
    return finish(rows, row.temperature, row.weight, row.mask, row.divisor, row.reduce)


def _closed(row: Row) -> ClosedRows:
    kept = _kept(row)
    return lambda s, t, need, _: reference.topk_closed(s, t, kept, row.temperature, need)


topk = register("topk_kd", _topk_reference, Launcher(_arguments), _closed)
