"""Autograd over a loss and its gradients in closed form, for eager calls on the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kdfast.ops.common.gradients import Value, differentiable_gradients, is_plain, save, saved
from kdfast.profiling import annotate
from kdfast.reference.closed import Closed

ClosedRows = Callable[[torch.Tensor, torch.Tensor, bool, bool], Closed]


class Form(NamedTuple):
    """A loss of two logit tensors.

    Attributes:
        closed: ``(student, teacher, need_student, need_teacher)`` to rows without factor, and T times their gradients.
        plain: The whole loss of student and teacher, of operators that differentiate to any order.
    """

    closed: ClosedRows
    plain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Factors(NamedTuple):
    """What stands beside the rows: T²·weight/divisor, 0 where the mask is False; summed when ``reduce``."""

    temperature: Value
    dim: int
    row_weight: torch.Tensor | None
    mask: torch.Tensor | None
    divisor: Value
    reduce: bool


def usable(student: torch.Tensor, teacher: torch.Tensor) -> bool:
    """Whether nothing looks inside; float64 takes the differentiable form, too."""
    return is_plain(student, teacher) and torch.float64 not in (student.dtype, teacher.dtype)


def closed_loss(student: torch.Tensor, teacher: torch.Tensor, form: Form, factors: Factors) -> torch.Tensor:
    """The loss, with exact gradients to both."""
    out: torch.Tensor = _Closed.apply(student, teacher, form, factors)  # type: ignore[no-untyped-call]
    return out


class _Closed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, form: Form, factors: Factors
    ) -> torch.Tensor:
        temperature, _, row_weight, mask, divisor, reduce = factors
        rows, *grads = form.closed(student, teacher, *ctx.needs_input_grad[:2])
        scale = temperature / divisor  # T² of the loss over T of the softmax
        if row_weight is not None:
            scale = row_weight.to(rows.dtype) * scale
            rows = rows * scale
        if mask is not None:  # a masked row is 0 even where its logits are NaN
            rows = rows.masked_fill(~mask, 0.0)
        save(ctx, student, teacher)
        ctx.form, ctx.factors, ctx.scale, ctx.grads = form, factors, scale, grads
        total = rows.sum() if reduce else rows
        if reduce and not rows.numel():
            return total / divisor  # 0/0 is NaN, as in torch
        return total * (temperature if row_weight is not None else scale * temperature)

    @staticmethod
    @annotate("closed_loss.backward")
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher = saved(ctx)
        form, factors, needs = ctx.form, ctx.factors, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph=True: the plain form differentiates to any order
            out = form.plain(student, teacher)
            return (*differentiable_gradients(out, (student, teacher), needs, upstream), None, None)
        # What the forward wrote is given away, so that nothing is copied; a later backward computes anew.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            grads = form.closed(student, teacher, *needs)[1:]
        factor: Any
        if type(ctx.scale) is float and upstream.dim() == 0 and type(upstream) is torch.Tensor:
            factor = upstream.item() * ctx.scale  # nothing waits on a CPU, and a number is multiplied at once
        else:
            factor = upstream * ctx.scale
            factor = factor.unsqueeze(factors.dim) if factor.dim() else factor
        results: list[torch.Tensor | None] = []
        for grad, like in zip(grads, (student, teacher), strict=True):
            if grad is not None:
                grad = grad.mul_(factor)  # in float32, rounded once
                if factors.mask is not None:
                    grad.masked_fill_(~factors.mask.unsqueeze(factors.dim), 0.0)
                grad = grad.to(like.dtype)
            results.append(grad)
        return (*results, None, None)
