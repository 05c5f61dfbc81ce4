"""DIST as an op: always one value."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kdfast.ops.common.closed import ClosedRows
from kdfast.ops.common.row_loss import Grads, Launcher, Row, register, two_options
from kdfast.reference import dist as reference

__all__ = ["dist"]


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels import dist

    return dist


class _Launcher(Launcher):
    """Three launches for the loss, one for gradients: what the loss knew of rows and columns is kept for a backward."""

    def __call__(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        row: Row,
        grads: Grads = (None, None),
        upstream: torch.Tensor | None = None,
        exit_if_one: bool = False,
        want_loss: bool = True,
        fresh: bool = True,
    ) -> torch.Tensor:
        options = {"reduce": want_loss, "upstream": upstream, "exit_if_one": exit_if_one, "fresh": fresh}
        out: torch.Tensor = _kernels().run(student, teacher, *_factors(row), grads, **options)[0]
        return out

    def begin(
        self, student: torch.Tensor, teacher: torch.Tensor, row: Row, grads: Grads
    ) -> tuple[torch.Tensor, Any]:
        factors = _factors(row)
        out, values = _kernels().run(student, teacher, *factors, grads, fresh=True)
        return out, (factors, values)

    def again(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        grads: Grads,
        upstream: torch.Tensor,
        exit_if_one: bool,
        kept: Any,
    ) -> None:
        factors, values = kept
        options = {"reduce": False, "upstream": upstream, "exit_if_one": exit_if_one, "fresh": True}
        _kernels().run(student, teacher, *factors, grads, **options, values=values)


def _factors(row: Row) -> tuple[Any, ...]:
    return (*two_options(row), _kernels().Scale(row.temperature, row.divisor, None, None))


def _dist_reference(student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
    return reference.dist(student, teacher, *two_options(row), row.temperature) / row.divisor


def _closed(row: Row) -> ClosedRows:
    options, temperature = two_options(row), row.temperature
    return lambda s, t, *needs: reference.dist_closed(s, t, *options, temperature, *needs)


dist = register("dist", _dist_reference, _Launcher(), _closed)
