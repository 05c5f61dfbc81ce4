"""One way to register a loss of logits: choice of backend, autograd, and the form that torch.compile sees.

A :class:`RowLoss` has a reference and a launcher. Eager calls on the Triton backend take a plain
``autograd.Function``: its forward writes the gradients for an upstream gradient of 1 beside the loss, its first
backward launches at most once and returns at once if the upstream gradient is 1, else it recomputes, and so
does every later one. With create_graph=True the gradients come from the reference, differentiable again.
torch.compile sees the registered op, whose backward is itself an op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kdfast.backend import resolve
from kdfast.ops._closed import ClosedRows, Factors, Form, closed_loss, usable
from kdfast.ops._gradients import (
    Value,
    differentiable_gradients,
    empty_gradients,
    split_value,
    takes_reference,
)
from kdfast.profiling import annotate
from kdfast.reference import losses as reference_losses

__all__ = ["Row", "RowLoss", "register"]


class Row(NamedTuple):
    """What a row loss is called with beside the two logit tensors.

    Attributes:
        indices: Integer argument of the loss (target classes), or None.
        extra: Floating-point argument that gets no gradient, or None.
        options: Numbers of the loss (α, β).
        dim: Class dimension, non-negative.
        temperature: T, a float or a 0-d tensor on the logits' device.
        weight: One factor a row, or None.
        mask: bool, one a row, or None.
        divisor: Of the sum over rows; a float or a 0-d tensor.
        reduce: Sum the rows.
    """

    indices: torch.Tensor | None
    extra: torch.Tensor | None
    options: tuple[float, ...]
    dim: int
    temperature: Value
    weight: torch.Tensor | None
    mask: torch.Tensor | None
    divisor: Value
    reduce: bool


@dataclass(frozen=True)
class RowLoss:
    """One loss: how the reference computes it, how it is launched, and its registered ops.

    Attributes:
        reference: ``(student, teacher, row) -> rows or their sum``, differentiable.
        launcher: ``(student, teacher, row, grad_student=, grad_teacher=, upstream=, exit_if_one=, want_loss=)``.
        op: The registered op, ``kdfast::NAME``.
        closed: The reference in fewer passes, as :attr:`kdfast.ops._closed.Form.closed`; None where it has none.
    """

    reference: Callable[[torch.Tensor, torch.Tensor, Row], torch.Tensor]
    launcher: Callable[..., torch.Tensor]
    op: Any
    closed: Callable[[Row], ClosedRows | None] | None = None

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, row: Row) -> torch.Tensor:
        """The loss; arguments are checked by the caller."""
        if takes_reference(student, teacher):
            closed = self.closed(row) if self.closed is not None and usable(student, teacher) else None
            if closed is None:
                return self.reference(student, teacher, row)
            factors = Factors(row.temperature, row.dim, row.weight, row.mask, row.divisor, row.reduce)
            form = Form(closed, lambda s, t: self.reference(s, t, row))
            return closed_loss(student, teacher, form, factors)
        row = row._replace(
            indices=_contiguous(row.indices),
            extra=_contiguous(row.extra),
            weight=_contiguous(row.weight),
            mask=_contiguous(row.mask),
        )
        if torch.compiler.is_compiling():
            out: torch.Tensor = self.op(student, teacher, *flatten(row))
        elif torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
            out = _Function.apply(student, teacher, self, row)  # type: ignore[no-untyped-call]
        else:
            out = self.launcher(student, teacher, row)
        return out


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Function(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, loss: RowLoss, row: Row
    ) -> torch.Tensor:
        ctx.loss, ctx.row = loss, row
        ctx.save_for_backward(student, teacher)
        ctx.grads = empty_gradients(ctx.needs_input_grad, student, teacher) if row.reduce else None
        grad_student, grad_teacher = ctx.grads or (None, None)
        return loss.launcher(student, teacher, row, grad_student=grad_student, grad_teacher=grad_teacher)

    @staticmethod
    @annotate("row_loss.backward")
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        loss, row = ctx.loss, ctx.row
        if torch.is_grad_enabled():  # create_graph=True: the reference differentiates to any order
            needs = ctx.needs_input_grad[:2]
            out = loss.reference(student, teacher, row)
            return (*differentiable_gradients(out, (student, teacher), needs, upstream), None, None)
        first, ctx.grads = ctx.grads, None
        grads = first or empty_gradients(ctx.needs_input_grad, student, teacher)
        loss.launcher(
            student,
            teacher,
            row,
            grad_student=grads[0],
            grad_teacher=grads[1],
            upstream=upstream.contiguous(),
            exit_if_one=first is not None,
            want_loss=False,
        )
        return (*grads, None, None)


# --- the registered form -------------------------------------------------------------------------------------
# A 0-d tensor and a float are different arguments to the schema: each value travels as (float, Tensor?).


def flatten(row: Row) -> tuple[Any, ...]:
    return (
        row.indices,
        row.extra,
        list(row.options),
        row.dim,
        *split_value(row.temperature),
        row.weight,
        row.mask,
        *split_value(row.divisor),
        row.reduce,
    )


def _row(flat: tuple[Any, ...]) -> Row:
    index, extra, options, dim, temperature, t_tensor, weight, mask, divisor, n_tensor, reduce = flat
    return Row(
        index,
        extra,
        tuple(options),
        dim,
        temperature if t_tensor is None else t_tensor,
        weight,
        mask,
        divisor if n_tensor is None else n_tensor,
        reduce,
    )


def register(
    name: str,
    reference_loss: Callable[[torch.Tensor, torch.Tensor, Row], torch.Tensor],
    launcher: Callable[..., torch.Tensor],
    closed: Callable[[Row], ClosedRows | None] | None = None,
) -> RowLoss:
    """Register ``kdfast::name`` and ``kdfast::name_backward``, with fakes and autograd."""

    @torch.library.custom_op(f"kdfast::{name}", mutates_args=())
    def op(
        student: torch.Tensor,
        teacher: torch.Tensor,
        index: torch.Tensor | None,
        extra: torch.Tensor | None,
        options: list[float],
        dim: int,
        temperature: float,
        temperature_tensor: torch.Tensor | None,
        row_weight: torch.Tensor | None,
        mask: torch.Tensor | None,
        divisor: float,
        divisor_tensor: torch.Tensor | None,
        reduce: bool,
    ) -> torch.Tensor:
        row = _row(
            (
                index,
                extra,
                options,
                dim,
                temperature,
                temperature_tensor,
                row_weight,
                mask,
                divisor,
                divisor_tensor,
                reduce,
            )
        )
        if resolve(student, teacher) == "reference":
            return reference_loss(student, teacher, row).clone()
        return launcher(student, teacher, row)

    @op.register_fake
    def _(student: torch.Tensor, teacher: torch.Tensor, *flat: Any) -> torch.Tensor:
        row = _row(flat)
        shape = () if row.reduce else student.shape[: row.dim] + student.shape[row.dim + 1 :]
        return student.new_empty(shape, dtype=reference_losses.compute_dtype(student, teacher))

    @torch.library.custom_op(f"kdfast::{name}_backward", mutates_args=())
    def backward_op(
        upstream: torch.Tensor,
        student: torch.Tensor,
        teacher: torch.Tensor,
        index: torch.Tensor | None,
        extra: torch.Tensor | None,
        options: list[float],
        dim: int,
        temperature: float,
        temperature_tensor: torch.Tensor | None,
        row_weight: torch.Tensor | None,
        mask: torch.Tensor | None,
        divisor: float,
        divisor_tensor: torch.Tensor | None,
        reduce: bool,
        need_student: bool,
        need_teacher: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        row = _row(
            (
                index,
                extra,
                options,
                dim,
                temperature,
                temperature_tensor,
                row_weight,
                mask,
                divisor,
                divisor_tensor,
                reduce,
            )
        )
        grads = empty_gradients((need_student, need_teacher), student, teacher)
        if resolve(student, teacher) == "reference":
            # torch.func differentiates here, below autograd, where torch.autograd does not record.
            vjp = torch.func.vjp(lambda s, t: reference_loss(s, t, row), student, teacher)[1]
            for grad, value in zip(grads, vjp(upstream), strict=True):
                if grad is not None:
                    grad.copy_(value)
        else:
            launcher(
                student,
                teacher,
                row,
                grad_student=grads[0],
                grad_teacher=grads[1],
                upstream=upstream.contiguous(),
                want_loss=False,
            )
        return (
            grads[0] if grads[0] is not None else student.new_empty(0),
            grads[1] if grads[1] is not None else student.new_empty(0),
        )

    @backward_op.register_fake
    def _(
        upstream: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, *flat: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        need_student, need_teacher = flat[-2:]
        return (
            torch.empty_like(student) if need_student else student.new_empty(0),
            torch.empty_like(teacher) if need_teacher else student.new_empty(0),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in inputs))
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]

    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = [y if x is None else x for x, y in zip(ctx.saved_tensors, ctx.others, strict=True)]
        need = ctx.needs_input_grad[:2]
        grads = backward_op(upstream, *inputs, *need)
        return (*(g if n else None for g, n in zip(grads, need, strict=True)), *[None] * (len(inputs) - 2))

    op.register_autograd(backward, setup_context=setup_context)
    return RowLoss(reference_loss, launcher, op, closed)
