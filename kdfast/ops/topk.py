"""The KL to a cached top-k teacher as an op: `teacher` is [..., k], `index` its classes, `extra` its log-sum-exp."""

from __future__ import annotations

import torch

from kdfast.ops.common.closed import ClosedRows
from kdfast.ops.common.row_loss import Grads, Row, register
from kdfast.reference import topk as reference
from kdfast.reference.common import finish, without_masked

__all__ = ["topk"]


def _launch_topk(
    student: torch.Tensor,
    teacher: torch.Tensor,
    row: Row,
    grads: Grads = (None, None),
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
    want_loss: bool = True,
    fresh: bool = True,
) -> torch.Tensor:
    from kdfast.kernels import topk as kernels
    from kdfast.kernels.common.scale import Scale

    out: torch.Tensor = kernels.topk(
        student,
        row.label,
        teacher.contiguous(),
        row.factor,
        Scale(row.temperature, row.divisor, row.weight, row.mask),
        bucket=bool(row.options[0]),
        reduce=row.reduce and want_loss,
        want_rows=want_loss and not row.reduce,
        grad_student=grads[0],
        upstream=upstream,
        exit_if_one=exit_if_one,
    )
    return out


def _topk_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    assert row.label is not None
    (student,) = without_masked(row.mask, row.dim, student)
    rows = reference.topk_rows(student, row.label, teacher, row.factor, bool(row.options[0]), row.temperature)
    return finish(rows, row.temperature, row.weight, row.mask, row.divisor, row.reduce)


def _closed(row: Row) -> ClosedRows:
    label, factor, bucket = row.label, row.factor, bool(row.options[0])
    assert label is not None
    return lambda s, t, need, _: reference.topk_closed(s, label, t, factor, bucket, row.temperature, need)


topk = register("topk_kd", _topk_reference, _launch_topk, _closed)
