"""The KL op: choice of backend, autograd, and the registered form that torch.compile sees.

Eager calls take a plain ``autograd.Function`` with a direct launch, since torch's dispatcher costs tens of
microseconds a call. Its forward writes the gradients for an upstream gradient of 1, while the rows are on the
chip; the first backward launches at most once and returns at once if the upstream gradient is 1, else it
recomputes. With create_graph=True the gradients come from the reference, differentiable again. A later
backward of the same graph recomputes into fresh memory, so that what an earlier one
returned never changes. Under torch.compile, and for unreduced losses, the backward always recomputes.
"""

from __future__ import annotations

from typing import Any

import torch

from kdfast.ops import _closed
from kdfast.ops._gradients import (
    Value,
    differentiable_gradients,
    empty_gradients,
    split_value,
    takes_reference,
)
from kdfast.profiling import annotate
from kdfast.reference import losses as reference_losses
from kdfast.reference.kl_closed import kd_kl_closed

Labels = reference_losses.Labels

__all__ = ["Labels", "kd_kl", "kd_statistics"]


def kd_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: Value,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: Value,
    reduce: bool,
    labels: Labels | None = None,
) -> torch.Tensor:
    """T²·w·KL of each row over ``divisor``, summed when ``reduce``; arguments are checked by the caller.

    Args:
        student: Logits.
        teacher: Logits of the same shape, on the same device.
        temperature: T, a float or a 0-d tensor on the logits' device.
        dim: Class dimension, non-negative.
        row_weight: None, or the logits' shape without ``dim``.
        mask: None, or bool of that shape.
        divisor: A float or a 0-d tensor on the logits' device.
        reduce: Sum the rows.
        labels: Add w times the cross-entropy with these; tensors of one value a row, contiguous.
    """
    if takes_reference(student, teacher):
        if labels is None and _closed.usable(student, teacher):
            factors = _closed.Factors(temperature, dim, row_weight, mask, divisor, reduce)
            form = _closed.Form(
                lambda s, t, *needs: kd_kl_closed(s, t, temperature, dim, *needs),
                lambda s, t: reference_losses.kd_kl(s, t, *factors),
            )
            return _closed.closed_loss(student, teacher, form, factors)
        return reference_losses.kd_kl(
            student, teacher, temperature, dim, row_weight, mask, divisor, reduce, labels
        )
    row_weight = None if row_weight is None else row_weight.contiguous()
    mask = None if mask is None else mask.contiguous()
    if torch.compiler.is_compiling():
        return _registered(student, teacher, temperature, dim, row_weight, mask, divisor, reduce, labels)
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        out: torch.Tensor = _KLFunction.apply(  # type: ignore[no-untyped-call]
            student, teacher, temperature, dim, row_weight, mask, divisor, reduce, labels
        )
        return out
    from kdfast.kernels import losses as kernels

    scale = kernels.Scale(temperature, divisor, row_weight, mask)
    result: torch.Tensor = kernels.kd_kl(
        student, teacher, dim, scale, reduce=reduce, want_rows=not reduce, labels=labels
    )
    return result


class _KLFunction(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        temperature: Value,
        dim: int,
        row_weight: torch.Tensor | None,
        mask: torch.Tensor | None,
        divisor: Value,
        reduce: bool,
        labels: Labels | None,
    ) -> torch.Tensor:
        from kdfast.kernels import losses as kernels

        ctx.dim, ctx.reduce, ctx.labels = dim, reduce, labels
        ctx.scale = kernels.Scale(temperature, divisor, row_weight, mask)
        ctx.save_for_backward(student, teacher)
        ctx.grads = empty_gradients(ctx.needs_input_grad, student, teacher) if reduce else None
        grad_student, grad_teacher = ctx.grads or (None, None)
        result: torch.Tensor = kernels.kd_kl(
            student,
            teacher,
            dim,
            ctx.scale,
            reduce=reduce,
            want_rows=not reduce,
            grad_student=grad_student,
            grad_teacher=grad_teacher,
            labels=labels,
        )
        return result

    @staticmethod
    @annotate("kd_kl_div.backward")
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from kdfast.kernels import losses as kernels

        student, teacher = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the reference differentiates to any order
            return (*_differentiable_gradients(ctx, student, teacher, upstream), *[None] * 7)
        first, ctx.grads = ctx.grads, None
        grads = first or empty_gradients(ctx.needs_input_grad, student, teacher)
        kernels.kd_kl(
            student,
            teacher,
            ctx.dim,
            ctx.scale,
            reduce=False,
            want_rows=False,
            grad_student=grads[0],
            grad_teacher=grads[1],
            upstream=upstream.contiguous(),
            exit_if_one=first is not None,
            labels=ctx.labels,
        )
        return (*grads, *[None] * 7)


def _differentiable_gradients(
    ctx: Any, student: torch.Tensor, teacher: torch.Tensor, upstream: torch.Tensor
) -> list[torch.Tensor | None]:
    temperature, divisor, row_weight, mask = ctx.scale
    out = reference_losses.kd_kl(
        student, teacher, temperature, ctx.dim, row_weight, mask, divisor, ctx.reduce, ctx.labels
    )
    return differentiable_gradients(out, (student, teacher), ctx.needs_input_grad[:2], upstream)


def kd_statistics(
    student: torch.Tensor, teacher: torch.Tensor, temperature: Value, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL without T², teacher's class, its probability at T = 1, agreement) of each row; no gradient."""
    student, teacher = student.detach(), teacher.detach()
    if torch.compiler.is_compiling():
        from kdfast.ops.losses_registered import kd_statistics_op

        out: tuple[torch.Tensor, ...] = kd_statistics_op(student, teacher, *split_value(temperature), dim)
        kl, teacher_class, probability, agreement = out
        return kl, teacher_class, probability, agreement
    return compute_statistics(student, teacher, temperature, dim)


def compute_statistics(
    student: torch.Tensor, teacher: torch.Tensor, temperature: Value, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Below autograd and the dispatcher: the reference, or one launch."""
    if takes_reference(student, teacher):
        return reference_losses.kd_statistics(student, teacher, temperature, dim)
    from kdfast.kernels import losses as kernels

    shape = student.shape[:dim] + student.shape[dim + 1 :]
    statistics = kernels.Statistics(
        student.new_empty(shape, dtype=torch.int64),
        student.new_empty(shape, dtype=torch.float32),
        student.new_empty(shape, dtype=torch.bool),
    )
    # The kernel's factor is T² over a divisor: T² takes it away again.
    scale = kernels.Scale(temperature, temperature * temperature, None, None)
    kl: torch.Tensor = kernels.kd_kl(student, teacher, dim, scale, reduce=False, statistics=statistics)
    return (kl, *statistics)


def _registered(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: Value,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: Value,
    reduce: bool,
    labels: Labels | None,
) -> torch.Tensor:
    from kdfast.ops.losses_registered import distillation_op, kd_kl_op

    t, n = split_value(temperature), split_value(divisor)
    if labels is None:
        out: torch.Tensor = kd_kl_op(student, teacher, *t, dim, row_weight, mask, *n, reduce)
    else:
        out = distillation_op(student, teacher, *t, dim, row_weight, mask, *n, reduce, *labels)
    return out
