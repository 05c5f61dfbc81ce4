"""One way from logits to a launch over their rows: every family of row losses goes through :class:`RowLaunches`.

Its kernels take the same arguments in the same order: tensors and gradients, outputs, row factors, sizes, strides. What
is a family's own follows by name. All that geometry decides is decided once (:class:`_RowCall`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .. import launch as launching
from ..keys import extension, launch_key
from ..launch import Kept, Launch, reduction
from .layout import RowLayout, as_rows
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
        copied: Whether ``tensors`` are copies.
    """

    tensors: tuple[torch.Tensor | None, ...]
    given: tuple[torch.Tensor | None, ...]
    layout: RowLayout
    strides: tuple[int, ...]
    unit: int
    num_classes: int
    copied: bool

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
    copied = layout is None
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
    return Rows(tensors, tuple(gradients), layout, flat, unit, reads[0].shape[dim], copied)


def loop_sizes(plan: TilePlan, at: Rows) -> dict[str, Any]:
    """What kernels take that read rows in blocks of vectors (vectors.py)."""
    return {"THREADS": plan.chunks, "VECTOR": plan.width, "ALONG": int(at.wide)}


class Before(NamedTuple):
    """A launch that reads the same logits first, and leaves ``width`` numbers a program for the next's ``sums_ptr``."""

    kernel: Any
    constants: dict[str, Any]
    width: int


class Shared(NamedTuple):
    """Memory of one launch that its programs share: ``sums_ptr``, float32, and ``ticket_ptr``, zeros to count in."""

    sums: int
    tickets: int


class RowPlan(NamedTuple):
    """How one geometry is launched.

    Attributes:
        kernel: Of a row loss.
        grid: Its programs.
        constants: What only this kernel takes, and the launch's warps.
        apart: Sum the rows in a launch of their own: a cluster's programs would each count themselves.
        before: What is launched first.
        shared: What programs share.
        partials: What is summed at the end, where that is not one number a program.
    """

    kernel: Any
    grid: tuple[int]
    constants: dict[str, Any]
    apart: bool = False
    before: Before | None = None
    shared: Shared | None = None
    partials: int = 0


class Wanted(NamedTuple):
    """What a call writes beside the gradients.

    Attributes:
        rows: One value a row.
        total: Their sum, in a fixed order.
        exit_if_one: Nothing if the single upstream value is 1: the gradients are there already.
    """

    rows: bool
    total: bool
    exit_if_one: bool = False


#: The fields of a Scale, as a tuple that takes less to make.
Factors = tuple[torch.Tensor | float, torch.Tensor | float, torch.Tensor | None, torch.Tensor | None]


class RowLaunches:
    """The launches of a family of row losses, each planned once for its geometry.

    Args:
        plan: ``(rows, *options)`` to a :class:`RowPlan`.
        further: Parameters that only this family's kernels have, and that vary from call to call.
        reads: Logit tensors that they read.
    """

    def __init__(self, plan: Callable[..., RowPlan], further: tuple[str, ...] = (), reads: int = 2) -> None:
        self.plan, self.further, self.reads = plan, further, reads
        self.kept = Kept()
        #: The same in C++, where it was built: it does nothing and returns None where anything is out of the ordinary.
        self._run: Callable[..., torch.Tensor | None] | None = None
        if extension is not None:
            home = {"type": torch.Tensor, "home": vars(launching), "like": torch.empty_like}
            self._run = extension.kept_rows(home | {"kept": self.kept})

    def run(
        self,
        reads: tuple[torch.Tensor, ...],
        gradients: tuple[torch.Tensor | None, ...],
        dim: int,
        scale: Scale | Factors,
        want: Wanted,
        upstream: torch.Tensor | None = None,
        further: tuple[Any, ...] = (),
        options: tuple[Any, ...] = (),
        fresh: bool = False,
    ) -> torch.Tensor:
        """Launch once.

        Args:
            reads: Logits of one shape.
            gradients: Written, where not None.
            dim: Class dimension, non-negative.
            scale: The row factors.
            want: What is written beside them.
            upstream: Multiplies loss and gradients: one value, or contiguous, one a row.
            further: Values of this family's own parameters: tensors, contiguous, floats, or None.
            options: What else the plan depends on.
            fresh: Whether the gradients are ``torch.empty_like`` of what they belong to.

        Returns:
            The sum, 0-d, when it is wanted, else one float32 value a row, or nothing of meaning.
        """
        if fresh and self._run is not None:
            done = self._run(reads, gradients, dim, scale, want, upstream, further, options)
            if done is not None:
                return done
        student, device = reads[0], reads[0].device
        temperature, divisor, weight, mask = scale
        if not (type(temperature) is type(divisor) is float):
            temperature, divisor, weight, mask = scale = Scale(*scale).on(device)
        others = (weight, mask, upstream, temperature, divisor, *further)
        if fresh:
            key: Any = (launch_key(reads, (*gradients, *others)), dim, want, options)
        else:
            key = (launch_key((*reads, *gradients), others), in_place(reads, gradients), dim, want, options)
        call = self.kept.get(key)
        if call is None:
            if student.numel() == 0:
                return _nothing(student, dim, want, divisor)
            at = rows_of(reads, gradients, dim)
            call = _RowCall(self, at, dim, want, others, options)
            if at.copied:
                out = call(at.tensors, scale, upstream, further)
                at.copy_back()
                return out
            call = self.kept.keep(key, call, device)
        return call((*reads, *gradients), scale, upstream, further)

    #: The same, in more of Python's time.
    __call__ = run


def _nothing(student: torch.Tensor, dim: int, want: Wanted, divisor: Any) -> torch.Tensor:
    """The result where there are no logits: 0 a row; their sum is 0 over the divisor: 0/0 is NaN, as in torch."""
    if want.total:
        return student.new_zeros((), dtype=torch.float32).div_(divisor)
    return student.new_zeros(student.shape[:dim] + student.shape[dim + 1 :], dtype=torch.float32)


def in_place(reads: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]) -> bool:
    """Whether a gradient lies in the memory of the logits."""
    held = {x.untyped_storage().data_ptr() for x in reads if x is not None} - {0}  # 0: no memory, as on meta
    return any(x is not None and x.untyped_storage().data_ptr() in held for x in gradients)


class _RowCall:
    """One geometry of a family: what is launched, and the memory that it needs. It holds no tensor."""

    __slots__ = (
        "alone",
        "apart",
        "before",
        "device",
        "launch",
        "partials",
        "programs",
        "rows",
        "shared",
        "total",
        "width",
    )

    def __init__(
        self,
        family: RowLaunches,
        at: Rows,
        dim: int,
        want: Wanted,
        others: tuple[Any, ...],
        options: tuple[Any, ...],
    ) -> None:
        student = at.tensors[0]
        assert student is not None
        weight, mask, upstream, temperature, divisor, *_ = others
        plan: RowPlan = family.plan(at, *options)
        single = upstream is not None and upstream.dim() == 0
        common = {
            "V": at.num_classes,
            "UNIT": at.unit,
            "T_PTR": isinstance(temperature, torch.Tensor),
            "EARLY_EXIT": want.exit_if_one and single,
            "enable_fp_fusion": True,
        }
        self.device, self.programs, self.total = student.device, plan.grid, want.total
        self.apart = plan.apart and want.total
        self.shared, self.partials = plan.shared, plan.partials or plan.grid[0]
        shape = student.shape[:dim] + student.shape[dim + 1 :]
        self.rows = shape if want.rows or self.apart else None
        constants = common | {
            "DIVISOR_PTR": isinstance(divisor, torch.Tensor),
            "WEIGHT": weight is not None,
            "MASK": mask is not None,
            "UPSTREAM": 0 if upstream is None else 1 if single else 2,
            "STORE_ROWS": self.rows is not None,
            "REDUCE": self.total and not self.apart,
        }
        constants |= {name: gradient is not None for name, gradient in zip(_GRADIENTS, at.gradients)}
        further = family.further
        if plan.before is not None:
            further = (*further, "sums_ptr")
        elif plan.shared is not None:
            further = (*further, "sums_ptr", "ticket_ptr")
        self.launch = Launch(
            plan.kernel,
            plan.grid,
            (at.num_rows, at.layout.inner, *at.strides),
            constants | plan.constants,
            student.device,
            further,
        )
        #: Partial sums, 0 without a total; None where ``kdfast._C`` may not launch alone.
        self.alone: int | None = self.partials if self.total else 0
        if self.rows is not None or plan.before is not None or plan.shared is not None:
            self.alone = None
        self.before, self.width = None, 0
        if plan.before is not None:
            reads = len(at.tensors) - len(at.given)
            self.width = plan.before.width
            self.before = Launch(
                plan.before.kernel,
                plan.grid,
                (at.layout.inner, *at.strides[: 3 * reads]),
                common | plan.before.constants,
                student.device,
            )

    def __call__(
        self,
        tensors: tuple[torch.Tensor | None, ...],
        scale: Scale | Factors,
        upstream: torch.Tensor | None,
        further: tuple[Any, ...],
    ) -> torch.Tensor:
        temperature, divisor, weight, mask = scale
        rows = loss = partial = counter = temperature_ptr = divisor_ptr = None
        if self.rows is not None:
            rows = torch.empty(self.rows, dtype=torch.float32, device=self.device)
        if self.total:
            if self.apart:
                # An address even where nothing is written to it: without it a cluster's kernel spills on sm_100.
                loss = torch.empty((), dtype=torch.float32, device=self.device)
            else:
                partial, counter, one = reduction(self.device, self.partials)
                loss = torch.empty_like(one)  # memory like other memory is made soonest
        if type(temperature) is not float:
            temperature, temperature_ptr = value_and_pointer(temperature)
        if type(divisor) is not float:
            divisor, divisor_ptr = value_and_pointer(divisor)
        if self.before is not None:
            sums = torch.empty((*self.programs, self.width), dtype=torch.float32, device=self.device)
            self.before((*tensors[:2], sums, upstream, temperature, temperature_ptr))
            further = (*further, sums)
        elif self.shared is not None:
            # Zeros of their own for each call, also in a graph: it fills them in every replay.
            tickets = torch.zeros(self.shared.tickets, dtype=torch.int32, device=self.device)
            further = (
                *further,
                torch.empty(self.shared.sums, dtype=torch.float32, device=self.device),
                tickets,
            )
        self.launch(
            (
                *tensors, rows, loss, partial, counter, weight, mask, upstream,
                temperature, temperature_ptr, divisor, divisor_ptr,
            ),
            further,
        )  # fmt: skip
        if loss is None:
            return rows if rows is not None else tensors[0]
        return rows.sum() if self.apart and rows is not None else loss
