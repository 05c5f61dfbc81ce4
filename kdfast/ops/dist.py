"""DIST as an op: always one value."""

from __future__ import annotations

from typing import Any

import torch

from kdfast.ops.common.closed import ClosedRows
from kdfast.ops.common.row_loss import Row, register, two_options
from kdfast.reference import dist as reference

__all__ = ["dist"]


def _launch_dist(
    student: torch.Tensor, teacher: torch.Tensor, row: Row, *, want_loss: bool = True, **launch: Any
) -> torch.Tensor:
    from kdfast.kernels import dist as kernels
    from kdfast.kernels.common.scale import Scale

    out: torch.Tensor = kernels.dist(
        student,
        teacher,
        *two_options(row),
        Scale(row.temperature, row.divisor, None, None),
        reduce=want_loss,
        **launch,
    )
    return out


def _dist_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    return reference.dist(student, teacher, *two_options(row), row.temperature) / row.divisor


def _closed(row: Row) -> ClosedRows:
    options, temperature = two_options(row), row.temperature
    return lambda s, t, *needs: reference.dist_closed(s, t, *options, temperature, *needs)


dist = register("dist", _dist_reference, _launch_dist, _closed)
