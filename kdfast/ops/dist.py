"""DIST as an op: always one value."""

from __future__ import annotations

import torch

from kdfast.ops.common.closed import ClosedRows
from kdfast.ops.common.row_loss import Grads, Row, register, two_options
from kdfast.reference import dist as reference

__all__ = ["dist"]


def _launch_dist(
    student: torch.Tensor,
    teacher: torch.Tensor,
    row: Row,
    grads: Grads = (None, None),
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
    want_loss: bool = True,
) -> torch.Tensor:
    from kdfast.kernels import dist as kernels
    from kdfast.kernels.common.scale import Scale

    out: torch.Tensor = kernels.dist(
        student,
        teacher,
        *two_options(row),
        Scale(row.temperature, row.divisor, None, None),
        reduce=want_loss,
        grad_student=grads[0],
        grad_teacher=grads[1],
        upstream=upstream,
        exit_if_one=exit_if_one,
    )
    return out


def _dist_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    return reference.dist(student, teacher, *two_options(row), row.temperature) / row.divisor


def _closed(row: Row) -> ClosedRows:
    options, temperature = two_options(row), row.temperature
    return lambda s, t, *needs: reference.dist_closed(s, t, *options, temperature, *needs)


dist = register("dist", _dist_reference, _launch_dist, _closed)
