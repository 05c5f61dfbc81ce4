"""One way from logits to a launch over their rows: every family of row losses goes through :func:`launch_rows`.

Its kernels take the same arguments in the same order: tensors and gradients, outputs, row factors, sizes, strides. What
is a family's own follows by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..launch import RowLayout, arrival_counter, as_rows, device_guard, launch
from .plan import TilePlan
from .scale import Scale, value_and_pointer

#: Rows of a launch that 32 bits number, with what the last program may reach beyond them.
MAX_ROWS = 2**31 - 2**16
#: What a kernel's flags for its gradients are called.
_GRADIENTS = ("GRAD_S", "GRAD_T")


class Rows(NamedTuple):
    """Tensors of one shape as rows over one dimension.

    Attributes:
        tensors: What a kernel reads, then the gradients it writes, or None; copies where strides had too many groups.
        given: The gradients that the caller wants written.
        layout: Of the rows.
        strides: (outer, inner, class) of each of ``tensors``, one after the other, zeros for None; the outer ones in
            units, a divisor that the compiler can see.
        unit: That unit.
        num_classes: V.
    """

    tensors: tuple[torch.Tensor | None, ...]
    given: tuple[torch.Tensor | None, ...]
    layout: RowLayout
    strides: tuple[int, ...]
    unit: int
    num_classes: int

    @property
    def num_rows(self) -> int:
        """Of all programs together."""
        return self.layout.outer * self.layout.inner

    @property
    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """Where the kernel writes."""
        return self.tensors[-len(self.given) :]

    @property
    def wide(self) -> bool:
        """Whether rows lie class by class, and each begins and ends where 16 bytes do."""
        reads = self.tensors[: len(self.tensors) - len(self.given)]
        return (
            self.layout.inner == 1
            and all(steps[2] == 1 for steps in self.layout.strides)
            and all(self.unit * x.itemsize % 16 == 0 for x in reads if x is not None)
            and all(self.num_classes * x.itemsize % 16 == 0 for x in reads if x is not None)
        )

    def copy_back(self) -> None:
        """Fill the caller's gradients, where the kernel has written to copies."""
        for given, written in zip(self.given, self.gradients):
            if given is not written:
                given.copy_(written)


def rows_of(reads: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], dim: int) -> Rows:
    """View ``reads`` and ``gradients`` as rows over dimension ``dim``.

    Tensors whose strides fall into more than two groups are the one case that is copied.

    Raises:
        ValueError: There are :data:`MAX_ROWS` rows or more.
    """
    tensors = (*reads, *gradients)
    layout = as_rows([x for x in tensors if x is not None], dim)
    if layout is None:
        # Cloned, not just allocated: a launch may leave what is there already.
        copies = [g if g is None else g.clone(memory_format=torch.contiguous_format) for g in gradients]
        tensors = (*(x.contiguous() for x in reads), *copies)
        layout = as_rows([x for x in tensors if x is not None], dim)
    if layout.outer * layout.inner >= MAX_ROWS:
        raise ValueError(
            f"rows: got {layout.outer * layout.inner}; accepted: fewer than {MAX_ROWS}, since a launch counts them in "
            "32 bits (split the batch)"
        )
    own = iter(layout.strides)
    strides = [(0, 0, 0) if x is None else next(own) for x in tensors]
    unit = math.gcd(16, *(outer for outer, _, _ in strides))
    flat = tuple(step for outer, inner, lane in strides for step in (outer // unit, inner, lane))
    return Rows(tensors, tuple(gradients), layout, flat, unit, reads[0].shape[dim])


def loop_sizes(plan: TilePlan, at: Rows) -> dict[str, Any]:
    """What kernels take that read rows in blocks of vectors (vectors.py)."""
    return {"THREADS": plan.chunks, "VECTOR": plan.width, "ALONG": int(at.wide)}


def outputs(
    student: torch.Tensor, dim: int, *, reduce: bool, want_rows: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(one float32 value a row, their sum), each None where it is not wanted."""
    shape = student.shape[:dim] + student.shape[dim + 1 :]
    rows = student.new_empty(shape, dtype=torch.float32) if want_rows or not reduce else None
    return rows, student.new_empty((), dtype=torch.float32) if reduce else None


def nothing(rows: torch.Tensor | None, loss: torch.Tensor | None, scale: Scale) -> torch.Tensor:
    """The result where there are no logits: 0 a row; their sum is 0 over the divisor: 0/0 is NaN, as in torch."""
    return rows.zero_() if loss is None else loss.zero_().div_(scale.divisor)


def launch_rows(
    kernel: Any,
    grid: tuple[int, ...],
    at: Rows,
    rows: torch.Tensor | None,
    loss: torch.Tensor | None,
    scale: Scale,
    upstream: torch.Tensor | None,
    exit_if_one: bool,
    *,
    in_launch: bool = True,
    **own: Any,
) -> None:
    """Launch ``kernel`` and fill ``rows``, ``loss`` (summed in this launch, in a fixed order) and the gradients.

    Args:
        kernel: Of a row loss.
        grid: Its programs.
        at: What it reads and writes.
        rows: One value a row, or None.
        loss: 0-d, or None.
        scale: The row factors.
        upstream: Multiplies loss and gradients: one value, or contiguous, one a row.
        exit_if_one: Do nothing if the single upstream value is 1: the gradients are there already.
        in_launch: False: ``loss`` is passed and not written. (Without it a cluster's kernel spills on sm_100.)
        **own: What only this kernel takes, and the launch's warps.
    """
    student = at.tensors[0]
    scale = scale.on(student.device)
    reduce = in_launch and loss is not None
    single = upstream is not None and upstream.dim() == 0
    with device_guard(student):
        launch(
            kernel,
            grid,
            *at.tensors,
            rows,
            loss,
            student.new_empty(grid, dtype=torch.float32) if reduce else None,
            arrival_counter(student.device) if reduce else None,
            scale.weight,
            scale.mask,
            upstream,
            *value_and_pointer(scale.temperature),
            *value_and_pointer(scale.divisor),
            at.num_rows,
            at.layout.inner,
            *at.strides,
            V=at.num_classes,
            UNIT=at.unit,
            T_PTR=isinstance(scale.temperature, torch.Tensor),
            DIVISOR_PTR=isinstance(scale.divisor, torch.Tensor),
            WEIGHT=scale.weight is not None,
            MASK=scale.mask is not None,
            UPSTREAM=0 if upstream is None else 1 if single else 2,
            EARLY_EXIT=exit_if_one and single,
            STORE_ROWS=rows is not None,
            REDUCE=reduce,
            enable_fp_fusion=True,
            **{name: gradient is not None for name, gradient in zip(_GRADIENTS, at.gradients)},
            **own,
        )
    at.copy_back()
