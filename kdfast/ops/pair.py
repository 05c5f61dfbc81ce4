"""JSD, decoupled KD and the other divergences as ops; common/row_loss.py says what row losses share."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kdfast.ops.common.closed import ClosedRows
from kdfast.ops.common.row_loss import Launcher, Row, launches, register, two_options
from kdfast.reference import pair as reference
from kdfast.reference.common import finish, without_masked
from kdfast.reference.pair import LEAST_BETA, dkd_closed, jsd_closed

__all__ = ["divergence", "dkd", "jsd", "launches", "without_ignored"]


def _launch_jsd(_: torch.Tensor, __: torch.Tensor, row: Row) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    kernels = _kernels()
    beta = row.options[1]
    return kernels.PAIR, (None, 0.0, beta, 1.0, None), (kernels.JSD, False, False, None, beta == 0.5)


def _launch_dkd(_: torch.Tensor, __: torch.Tensor, row: Row) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    kernels = _kernels()
    alpha, beta, *others = row.options
    ignore = int(others[0]) if others else None
    return kernels.PAIR, (row.label, alpha, beta, 1.0, None), (kernels.DKD, False, False, ignore)


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels import pair

    return pair


def _jsd_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    student, teacher = without_masked(row.mask, row.dim, student, teacher)
    rows = reference.jsd_rows(student, teacher, row.options[1], row.temperature, row.dim)
    return finish(rows, row.temperature, row.weight, row.mask, row.divisor, row.reduce)


def _dkd_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    alpha, beta, *others = row.options
    if others:
        row = without_ignored(row, int(others[0]))
    assert row.label is not None
    student, teacher = without_masked(row.mask, row.dim, student, teacher)
    rows = reference.dkd_rows(student, teacher, row.label, alpha, beta, row.temperature, row.dim)
    return finish(rows, row.temperature, row.weight, row.mask, row.divisor, row.reduce)


def without_ignored(row: Row, ignore: int) -> Row:
    """With the mask False where the target is ``ignore``, and targets that can be looked up."""
    assert row.label is not None
    counted = row.label != ignore
    mask = counted if row.mask is None else row.mask & counted
    return row._replace(mask=mask, label=row.label.masked_fill(~counted, 0))


def _jsd_closed(row: Row) -> ClosedRows | None:
    beta = row.options[1]
    if not LEAST_BETA <= beta <= 1 - LEAST_BETA:
        return None
    return lambda s, t, *needs: jsd_closed(s, t, beta, row.temperature, row.dim, *needs)


def _dkd_closed(row: Row) -> ClosedRows:
    target = row.label
    assert target is not None
    return lambda s, t, *needs: dkd_closed(s, t, target, *two_options(row), row.temperature, row.dim, *needs)


jsd = register("jsd", _jsd_reference, Launcher(_launch_jsd), _jsd_closed)
dkd = register("dkd", _dkd_reference, Launcher(_launch_dkd), _dkd_closed)


def _divergence(row: Row) -> tuple[int, tuple[float, float], torch.Tensor | float]:
    """(what the kernels and :data:`~kdfast.reference.pair.KINDS` count it as, its numbers, T over the teacher's)."""
    kind, alpha, beta, ratio = row.options
    return int(kind), (alpha, beta), ratio if row.factor is None else row.factor


def _launch_divergence(
    _: torch.Tensor, __: torch.Tensor, row: Row
) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    kernels = _kernels()
    if row.factor is None:  # as pair_arguments has it, nearly always and at once
        number, alpha, beta, own = row.options
        return kernels.PAIR, (None, alpha, beta, own, None), (int(number), own != 1.0, False, None)
    kind, numbers, ratio = _divergence(row)
    return kernels.PAIR, *kernels.pair_arguments(kind, None, *numbers, ratio)


def _divergence_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    student, teacher = without_masked(row.mask, row.dim, student, teacher)
    kind, numbers, ratio = _divergence(row)
    name = reference.KINDS[kind]
    rows = reference.divergence_rows(student, teacher, name, numbers, row.temperature, ratio, row.dim)
    return finish(rows, row.temperature, row.weight, row.mask, row.divisor, row.reduce)


#: Every kind of :func:`kdfast.functional.divergence_loss` but what :data:`jsd` and the KL op run.
divergence = register("divergence", _divergence_reference, Launcher(_launch_divergence))
