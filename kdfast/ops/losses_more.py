"""The kin of the KL op: JSD, decoupled KD, cached top-k teachers, DIST; see _row_loss.py for what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kdfast.ops._closed import ClosedRows
from kdfast.ops._row_loss import Row, register
from kdfast.reference import losses_more as reference
from kdfast.reference.losses_more_closed import LEAST_BETA, dkd_closed, jsd_closed

__all__ = ["Row", "dist", "dkd", "jsd", "topk"]


def _two(row: Row) -> tuple[float, float]:
    first, second = row.options
    return first, second


# --- generalised Jensen-Shannon divergence, decoupled KD -----------------------------------------------------


def _launch_pair(kind: str) -> Callable[..., torch.Tensor]:
    def launcher(
        student: torch.Tensor, teacher: torch.Tensor, row: Row, *, want_loss: bool = True, **launch: Any
    ) -> torch.Tensor:
        from kdfast.kernels import losses_more as kernels
        from kdfast.kernels.losses import Scale

        alpha, beta = _two(row)
        out: torch.Tensor = kernels.pair_loss(
            getattr(kernels, kind),
            student,
            teacher,
            row.indices,
            alpha,
            beta,
            row.dim,
            Scale(row.temperature, row.divisor, row.weight, row.mask),
            reduce=row.reduce and want_loss,
            want_rows=want_loss and not row.reduce,
            **launch,
        )
        return out

    return launcher


def _jsd_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    student, teacher = reference.without_masked(row.mask, row.dim, student, teacher)
    rows = reference.jsd_rows(student, teacher, row.options[1], row.temperature, row.dim)
    return reference.finish(rows, row.temperature, row.weight, row.mask, row.divisor, row.reduce)


def _dkd_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    assert row.indices is not None
    student, teacher = reference.without_masked(row.mask, row.dim, student, teacher)
    rows = reference.dkd_rows(student, teacher, row.indices, *_two(row), row.temperature, row.dim)
    return reference.finish(rows, row.temperature, row.weight, row.mask, row.divisor, row.reduce)


def _jsd_closed(row: Row) -> ClosedRows | None:
    beta = row.options[1]
    if not LEAST_BETA <= beta <= 1 - LEAST_BETA:
        return None
    return lambda s, t, *needs: jsd_closed(s, t, beta, row.temperature, row.dim, *needs)


def _dkd_closed(row: Row) -> ClosedRows:
    target = row.indices
    assert target is not None
    return lambda s, t, *needs: dkd_closed(s, t, target, *_two(row), row.temperature, row.dim, *needs)


jsd = register("jsd", _jsd_reference, _launch_pair("JSD"), _jsd_closed)
dkd = register("dkd", _dkd_reference, _launch_pair("DKD"), _dkd_closed)


# --- cached top-k teacher: `teacher` is [..., k], `index` its classes, `extra` its log-sum-exp -----------------


def _launch_topk(
    student: torch.Tensor,
    teacher: torch.Tensor,
    row: Row,
    *,
    want_loss: bool = True,
    grad_student: torch.Tensor | None = None,
    grad_teacher: None = None,
    **launch: Any,
) -> torch.Tensor:
    from kdfast.kernels import losses_topk as kernels
    from kdfast.kernels.losses import Scale

    out: torch.Tensor = kernels.topk(
        student,
        row.indices,
        teacher.contiguous(),
        row.extra,
        Scale(row.temperature, row.divisor, row.weight, row.mask),
        bucket=bool(row.options[0]),
        reduce=row.reduce and want_loss,
        want_rows=want_loss and not row.reduce,
        grad_student=grad_student,
        **launch,
    )
    return out


def _topk_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    assert row.indices is not None
    (student,) = reference.without_masked(row.mask, row.dim, student)
    rows = reference.topk_rows(
        student, row.indices, teacher, row.extra, bool(row.options[0]), row.temperature
    )
    return reference.finish(rows, row.temperature, row.weight, row.mask, row.divisor, row.reduce)


topk = register("topk_kd", _topk_reference, _launch_topk)


# --- DIST: always one value -----------------------------------------------------------------------------------


def _launch_dist(
    student: torch.Tensor, teacher: torch.Tensor, row: Row, *, want_loss: bool = True, **launch: Any
) -> torch.Tensor:
    from kdfast.kernels import losses_dist as kernels
    from kdfast.kernels.losses import Scale

    out: torch.Tensor = kernels.dist(
        student,
        teacher,
        *_two(row),
        Scale(row.temperature, row.divisor, None, None),
        reduce=want_loss,
        **launch,
    )
    return out


def _dist_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    return reference.dist(student, teacher, *_two(row), row.temperature) / row.divisor


dist = register("dist", _dist_reference, _launch_dist)
