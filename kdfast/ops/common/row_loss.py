"""One way to register a loss of logits: choice of backend, autograd, and the form that torch.compile sees.

A :class:`RowLoss` has a reference and a launcher. Eager calls on the Triton backend take a plain
``autograd.Function`` with a direct launch, since torch's dispatcher costs tens of microseconds a call: its forward
writes the gradients for an upstream gradient of 1 beside the loss, while the rows are on the chip; its first
backward launches at most once and returns at once if the upstream gradient is 1, else it recomputes, and so
does every later one, into fresh memory, so that what an earlier one returned never changes. With create_graph=True
the gradients come from the reference, differentiable again. torch.compile sees the registered op, whose backward is
itself an op and always recomputes, out of place; its outputs are fresh memory, never a view of an input. That moves 5N
where an eager call moves 3N: a graph cannot ask whether the upstream gradient is 1, and a gradient that the forward
had written would be rounded to the logits' dtype before a loss scale multiplies it, which is there to keep half
precision from losing just that; to multiply it out of place moves 2N more, 5N again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kdfast.backend import resolve
from kdfast.ops.common.closed import ClosedRows, Factors, Form, closed_loss, usable
from kdfast.ops.common.counters import fresh_counters
from kdfast.ops.common.gradients import (
    Value,
    differentiable_gradients,
    direct_apply,
    empty_gradients,
    is_compiling,
    is_grad_enabled,
    join_value,
    runs_now,
    save,
    saved,
    split_value,
    unwrapped,
)
from kdfast.ops.common.registered import registered_op
from kdfast.profiling import annotate
from kdfast.reference.common import compute_dtype

__all__ = ["Launcher", "Row", "RowLoss", "flatten", "launches", "register", "two_options"]

Tensor = torch.Tensor


class Row(NamedTuple):
    """What a row loss is called with beside the two logit tensors.

    Attributes:
        options: Numbers of the loss (α and β, smoothing).
        dim: Class dimension, non-negative.
        temperature: T, a float or a 0-d tensor on the logits' device.
        weight: One factor a row, or None.
        mask: bool, one a row, or None.
        divisor: Of the sum over rows; a float or a 0-d tensor.
        reduce: Sum the rows.
        label: Integer argument of the loss (target classes, kept indices), or None.
        factor: Floating-point argument that goes with it and gets no gradient, or None.
        second: A second ``label``, or None.
        second_factor: Its ``factor``, or None.
    """

    options: tuple[float, ...]
    dim: int
    temperature: Value
    weight: Tensor | None
    mask: Tensor | None
    divisor: Value
    reduce: bool
    label: Tensor | None = None
    factor: Tensor | None = None
    second: Tensor | None = None
    second_factor: Tensor | None = None

    def contiguous(self) -> Row:
        """The same with every tensor contiguous, as the kernels want it."""
        _, _, _, weight, mask, _, _, label, factor, second, second_factor = self
        if (  # in one look, like check_logits
            (weight is None or weight.is_contiguous())
            and (mask is None or mask.is_contiguous())
            and (label is None or label.is_contiguous())
            and (factor is None or factor.is_contiguous())
            and (second is None or second.is_contiguous())
            and (second_factor is None or second_factor.is_contiguous())
        ):
            return self
        values = (x.contiguous() if isinstance(x, Tensor) else x for x in self)
        return Row._make(values)


def launches(student: Tensor, teacher: Tensor, ignore: int) -> bool:
    """Whether a loss of these is launched here and now, and may leave it to the kernel which labels are ignored."""
    if is_compiling() or not -(2**31) <= ignore < 2**31:  # travels as a float
        return False
    return runs_now(student, teacher) and resolve(student, teacher) == "triton"


def two_options(row: Row) -> tuple[float, float]:
    """A loss's two numbers (α and β, β and γ)."""
    first, second = row.options
    return first, second


#: The schema of :class:`Row`: a 0-d tensor and a float are different arguments, so each value travels as both.
_ROW = (
    "float[] options, SymInt dim, Scalar temperature, Tensor? temperature_tensor, Tensor? weight, Tensor? mask, "
    "Scalar divisor, Tensor? divisor_tensor, bool reduce, "
    "Tensor? label, Tensor? factor, Tensor? second, Tensor? second_factor"
)
_FORWARD = f"(Tensor student, Tensor teacher, {_ROW}) -> Tensor"
_BACKWARD = (
    f"(Tensor upstream, Tensor student, Tensor teacher, {_ROW}, bool need_student, bool need_teacher) "
    "-> (Tensor, Tensor)"
)


def flatten(row: Row) -> tuple[Any, ...]:
    """The arguments of a registered op after the two logit tensors."""
    options, dim, temperature, weight, mask, divisor, *others = row
    return (list(options), dim, *split_value(temperature), weight, mask, *split_value(divisor), *others)


def _row(flat: tuple[Any, ...]) -> Row:
    options, dim, temperature, t_tensor, weight, mask, divisor, n_tensor, *others = flat
    t, n = join_value(temperature, t_tensor), join_value(divisor, n_tensor)
    return Row(tuple(options), dim, t, weight, mask, n, *others)


Reference = Callable[[Tensor, Tensor, Row], Tensor]
Grads = tuple[Tensor | None, Tensor | None]
Gradients = Callable[[Tensor, Tensor, Tensor, Row], tuple[Tensor, Tensor]]


#: Gradients that are not wanted.
_NEITHER = (None, None)


@functools.cache
def _kernels() -> Any:
    """What row losses share, imported when the Triton backend first runs."""
    from kdfast.kernels.common import launch_rows

    return launch_rows


class Launcher:
    """How a loss of two logit tensors is launched.

    Args:
        arguments: ``(student, teacher, row)`` to its RowLaunches, their further values, and options.
    """

    def __init__(self, arguments: Callable[[Tensor, Tensor, Row], tuple[Any, ...]] | None = None) -> None:
        self.arguments: Any = arguments

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        row: Row,
        grads: Grads = _NEITHER,
        upstream: Tensor | None = None,
        exit_if_one: bool = False,
        want_loss: bool = True,
        fresh: bool = True,
    ) -> Tensor:
        """Launch once.

        Args:
            student: Logits.
            teacher: Logits, or what stands in their place.
            row: What it is called with.
            grads: Written, memory like the logits', or None.
            upstream: Multiplies loss and gradients.
            exit_if_one: Whether nothing is to be done if that is 1.
            want_loss: Whether the loss itself is wanted.
            fresh: Whether the gradients are ``torch.empty_like`` of what they belong to (False: they may lie in the
                memory of the logits).
        """
        launches, further, options = self.arguments(student, teacher, row)
        _, dim, temperature, weight, mask, divisor, reduce, *_ = row
        reads = (student, teacher)[: launches.reads]
        scale = temperature, divisor, weight, mask
        total, rows, once, neither = _wants()
        want = (total if reduce else rows) if want_loss else (once if exit_if_one else neither)
        out: Tensor = launches.run(
            reads, grads[: launches.reads], dim, scale, want, upstream, further, options, fresh
        )
        return out

    def begin(self, student: Tensor, teacher: Tensor, row: Row, grads: Grads) -> tuple[Tensor, Any]:
        """The forward's launch, and what the backward's takes from it."""
        launches, further, options = self.arguments(student, teacher, row)
        _, dim, temperature, weight, mask, divisor, reduce, *_ = row
        scale = temperature, divisor, weight, mask
        reads = (student, teacher)[: launches.reads]
        want = _wants()[0 if reduce else 1]
        out = launches.run(reads, grads[: launches.reads], dim, scale, want, None, further, options, True)
        return out, (launches, dim, scale, further, options)

    def again(
        self, student: Tensor, teacher: Tensor, grads: Grads, upstream: Tensor, exit_if_one: bool, kept: Any
    ) -> None:
        """The backward's launch, after :meth:`begin` gave what it kept."""
        launches, dim, scale, further, options = kept
        reads = (student, teacher)[: launches.reads]
        want = _wants()[2 if exit_if_one else 3]
        launches.run(reads, grads[: launches.reads], dim, scale, want, upstream, further, options, True)


@functools.cache
def _wants() -> tuple[Any, Any, Any, Any]:
    """(The sum of the rows, the rows, no loss and nothing if the upstream gradient is 1, no loss)."""
    wanted = _kernels().Wanted
    return wanted(False, True), wanted(True, False), wanted(False, False, True), wanted(False, False)


@dataclass(frozen=True)
class RowLoss:
    """One loss: how the reference computes it, how it is launched, and its registered ops.

    Attributes:
        reference: ``(student, teacher, row) -> rows or their sum``, differentiable.
        launcher: On the Triton backend.
        op: The registered op, ``kdfast::NAME``.
        recorded: The eager path with autograd, once nothing transforms: ``(student, teacher, this, row)`` to the loss.
        closed: The reference in fewer passes, as :attr:`kdfast.ops.common.closed.Form.closed`; None where it has none.
    """

    reference: Reference
    launcher: Launcher
    op: Any
    recorded: Any
    closed: Callable[[Row], ClosedRows | None] | None = None

    def run(self, student: Tensor, teacher: Tensor, row: Row) -> Tensor:
        """The loss; arguments are checked by the caller."""
        if is_compiling():
            if resolve(student, teacher) == "reference":
                return self.reference(student, teacher, row)
            out: Tensor = self.op(student, teacher, *flatten(row.contiguous()))
            return out
        if not runs_now(student, teacher) or resolve(student, teacher) == "reference":
            return self._by_reference(student, teacher, row)
        return self.launch(student, teacher, row)

    #: The same, in more of Python's time.
    __call__ = run

    def launch(self, student: Tensor, teacher: Tensor, row: Row) -> Tensor:
        """The same where :func:`launches` has said that it may."""
        row = row.contiguous()
        if is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
            out: Tensor = self.recorded(unwrapped(student), unwrapped(teacher), self, row)
            return out
        return self.launcher(student, teacher, row)

    def _by_reference(self, student: Tensor, teacher: Tensor, row: Row) -> Tensor:
        closed = self.closed(row) if self.closed is not None and usable(student, teacher) else None
        if closed is None:
            return self.reference(student, teacher, row)
        factors = Factors(row.temperature, row.dim, row.weight, row.mask, row.divisor, row.reduce)
        return closed_loss(student, teacher, Form(closed, lambda s, t: self.reference(s, t, row)), factors)


def _forward(ctx: Any, student: Tensor, teacher: Tensor, loss: RowLoss, row: Row) -> Tensor:
    save(ctx, student, teacher)
    grads = empty_gradients(ctx.needs_input_grad, student, teacher) if row.reduce else None
    out, kept = loss.launcher.begin(student, teacher, row, grads or _NEITHER)
    ctx.called, ctx.grads = (loss, row, kept), grads
    return out


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher = saved(ctx)
    loss, row, kept = ctx.called
    if is_grad_enabled():  # create_graph=True: the reference differentiates to any order
        needs = ctx.needs_input_grad[:2]
        out = loss.reference(student, teacher, row)
        return (*differentiable_gradients(out, (student, teacher), needs, upstream), None, None)
    first, ctx.grads = ctx.grads, None
    grads = first or empty_gradients(ctx.needs_input_grad, student, teacher)
    loss.launcher.again(
        student, teacher, grads, upstream if row.reduce else upstream.contiguous(), first is not None, kept
    )
    return (*grads, None, None)


def register(
    name: str,
    reference: Reference,
    launcher: Launcher,
    closed: Callable[[Row], ClosedRows | None] | None = None,
    gradients: Gradients | None = None,
) -> RowLoss:
    """Register ``kdfast::name`` and ``kdfast::name_backward``, with fakes and autograd.

    ``gradients`` is the reference's gradient in closed form, ``(upstream, student, teacher, row)``; without it
    torch.func differentiates the reference.
    """

    @registered_op(name, _FORWARD)
    def op(student: Tensor, teacher: Tensor, *flat: Any) -> Tensor:
        row = _row(flat)
        if resolve(student, teacher) == "reference":
            return reference(student, teacher, row).clone()
        with fresh_counters():
            return launcher(student, teacher, row)

    @op.register_fake
    def _(student: Tensor, teacher: Tensor, *flat: Any) -> Tensor:
        row = _row(flat)
        shape = () if row.reduce else student.shape[: row.dim] + student.shape[row.dim + 1 :]
        return student.new_empty(shape, dtype=compute_dtype(student, teacher))

    @registered_op(f"{name}_backward", _BACKWARD)
    def backward_op(upstream: Tensor, student: Tensor, teacher: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
        row = _row(flat[:-2])
        grads = empty_gradients(flat[-2:], student, teacher)
        if resolve(student, teacher) == "reference":
            # torch.func differentiates here, below autograd, where torch.autograd does not record.
            values = (
                gradients(upstream, student, teacher, row)
                if gradients is not None
                else torch.func.vjp(lambda s, t: reference(s, t, row), student, teacher)[1](upstream)
            )
            for grad, value in zip(grads, values, strict=True):
                if grad is not None:
                    grad.copy_(value)
        else:
            launcher(student, teacher, row, grads, upstream.contiguous(), False, False)
        first, second = (student.new_empty(0) if grad is None else grad for grad in grads)
        return first, second

    @backward_op.register_fake
    def _(upstream: Tensor, student: Tensor, teacher: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
        first, second = empty_gradients(flat[-2:], student, teacher)
        return (
            student.new_empty(0) if first is None else first,
            student.new_empty(0) if second is None else second,
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [y if x is None else x for x, y in zip(ctx.saved_tensors, ctx.others, strict=True)]
        need = ctx.needs_input_grad[:2]
        grads = backward_op(upstream, *inputs, *need)
        return (*(g if n else None for g, n in zip(grads, need, strict=True)), *[None] * (len(inputs) - 2))

    op.register_autograd(backward, setup_context=setup_context)
    eager = {
        "forward": staticmethod(_forward),
        "backward": staticmethod(annotate(f"{name}.backward")(_backward)),
    }
    function = type(f"_{name}", (torch.autograd.Function,), eager)
    return RowLoss(reference, launcher, op.overload, direct_apply(function), closed)
