"""The KL op: choice of backend, autograd, and the registered form that torch.compile sees.

Eager calls take a plain ``autograd.Function`` with a direct launch, since torch's dispatcher costs tens of
microseconds a call. Its forward writes the gradients for an upstream gradient of 1, while the rows are on the
chip; the first backward launches at most once and returns at once if the upstream gradient is 1, else it
recomputes. With create_graph=True the gradients come from the reference, differentiable again. A later
backward of the same graph recomputes into fresh memory, so that what an earlier one
returned never changes. Under torch.compile, and for unreduced losses, the backward always recomputes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from kdfast.backend import resolve
from kdfast.ops import _kl_closed
from kdfast.reference import losses as reference_losses

if TYPE_CHECKING:
    pass

__all__ = ["kd_kl"]

Value = torch.Tensor | float


def kd_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: Value,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: Value,
    reduce: bool,
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
    """
    if resolve(student, teacher) == "reference":
        if _kl_closed.usable(student, teacher):
            closed: torch.Tensor = _kl_closed.KLClosed.apply(  # type: ignore[no-untyped-call]
                student, teacher, temperature, dim, row_weight, mask, divisor, reduce
            )
            return closed
        return reference_losses.kd_kl(student, teacher, temperature, dim, row_weight, mask, divisor, reduce)
    row_weight = None if row_weight is None else row_weight.contiguous()
    mask = None if mask is None else mask.contiguous()
    if torch.compiler.is_compiling():
        return _registered(student, teacher, temperature, dim, row_weight, mask, divisor, reduce)
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        out: torch.Tensor = _KLFunction.apply(  # type: ignore[no-untyped-call]
            student, teacher, temperature, dim, row_weight, mask, divisor, reduce
        )
        return out
    from kdfast.kernels import losses as kernels

    scale = kernels.Scale(temperature, divisor, row_weight, mask)
    result: torch.Tensor = kernels.kd_kl(student, teacher, dim, scale, reduce=reduce, want_rows=not reduce)
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
    ) -> torch.Tensor:
        from kdfast.kernels import losses as kernels

        ctx.dim, ctx.reduce = dim, reduce
        ctx.scale = kernels.Scale(temperature, divisor, row_weight, mask)
        ctx.save_for_backward(student, teacher)
        ctx.grads = _empty_gradients(ctx.needs_input_grad, student, teacher) if reduce else None
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
        )
        return result

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from kdfast.kernels import losses as kernels

        student, teacher = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the reference differentiates to any order
            return (*_differentiable_gradients(ctx, student, teacher, upstream), *[None] * 6)
        first, ctx.grads = ctx.grads, None
        grads = first or _empty_gradients(ctx.needs_input_grad, student, teacher)
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
        )
        return (*grads, None, None, None, None, None, None)


def _differentiable_gradients(
    ctx: Any, student: torch.Tensor, teacher: torch.Tensor, upstream: torch.Tensor
) -> list[torch.Tensor | None]:
    temperature, divisor, row_weight, mask = ctx.scale
    out = reference_losses.kd_kl(
        student, teacher, temperature, ctx.dim, row_weight, mask, divisor, ctx.reduce
    )
    needs = ctx.needs_input_grad[:2]
    wanted = [x for x, need in zip((student, teacher), needs, strict=True) if need]
    grads = iter(torch.autograd.grad(out, wanted, upstream, create_graph=True))
    return [next(grads) if need else None for need in needs]


def _empty_gradients(
    needs: tuple[bool, ...], student: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (
        torch.empty_like(student) if needs[0] else None,
        torch.empty_like(teacher) if needs[1] else None,
    )


# --- the registered form -------------------------------------------------------------------------------------
# A 0-d tensor and a float are different arguments to the schema: each value travels as (float, Tensor?).


def _split(value: Value) -> tuple[float, torch.Tensor | None]:
    return (math.nan, value) if isinstance(value, torch.Tensor) else (value, None)


def _join(value: float, tensor: torch.Tensor | None) -> Value:
    return value if tensor is None else tensor


def _registered(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: Value,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: Value,
    reduce: bool,
) -> torch.Tensor:
    result: torch.Tensor = kd_kl_op(
        student, teacher, *_split(temperature), dim, row_weight, mask, *_split(divisor), reduce
    )
    return result


@torch.library.custom_op("kdfast::kd_kl", mutates_args=())
def kd_kl_op(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    temperature_tensor: torch.Tensor | None,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: float,
    divisor_tensor: torch.Tensor | None,
    reduce: bool,
) -> torch.Tensor:
    """``kdfast::kd_kl``: the loss, or one value a row."""
    t, n = _join(temperature, temperature_tensor), _join(divisor, divisor_tensor)
    if resolve(student, teacher) == "reference":
        return reference_losses.kd_kl(student, teacher, t, dim, row_weight, mask, n, reduce).clone()
    from kdfast.kernels import losses as kernels

    scale = kernels.Scale(t, n, row_weight, mask)
    result: torch.Tensor = kernels.kd_kl(student, teacher, dim, scale, reduce=reduce, want_rows=not reduce)
    return result


@kd_kl_op.register_fake
def _(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    temperature_tensor: torch.Tensor | None,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: float,
    divisor_tensor: torch.Tensor | None,
    reduce: bool,
) -> torch.Tensor:
    shape = () if reduce else student.shape[:dim] + student.shape[dim + 1 :]
    return student.new_empty(shape, dtype=reference_losses.compute_dtype(student, teacher))


@torch.library.custom_op("kdfast::kd_kl_backward", mutates_args=())
def kd_kl_backward_op(
    upstream: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    temperature_tensor: torch.Tensor | None,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: float,
    divisor_tensor: torch.Tensor | None,
    need_student: bool,
    need_teacher: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``kdfast::kd_kl_backward``: gradients of student and teacher; an empty tensor where none is needed."""
    t, n = _join(temperature, temperature_tensor), _join(divisor, divisor_tensor)
    grads = _empty_gradients((need_student, need_teacher), student, teacher)
    if resolve(student, teacher) == "reference":
        computed = reference_losses.kd_kl_gradients(upstream, student, teacher, t, dim, row_weight, mask, n)
        for grad, value in zip(grads, computed, strict=True):
            if grad is not None:
                grad.copy_(value)
    else:
        from kdfast.kernels import losses as kernels

        kernels.kd_kl(
            student,
            teacher,
            dim,
            kernels.Scale(t, n, row_weight, mask),
            reduce=False,
            want_rows=False,
            grad_student=grads[0],
            grad_teacher=grads[1],
            upstream=upstream.contiguous(),
        )
    empty = student.new_empty(0)
    return (
        grads[0] if grads[0] is not None else empty,
        grads[1] if grads[1] is not None else empty.clone(),
    )


@kd_kl_backward_op.register_fake
def _(
    upstream: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    temperature_tensor: torch.Tensor | None,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: float,
    divisor_tensor: torch.Tensor | None,
    need_student: bool,
    need_teacher: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(student) if need_student else student.new_empty(0),
        torch.empty_like(teacher) if need_teacher else student.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    student, teacher, temperature, t_tensor, dim, row_weight, mask, divisor, n_tensor, _ = inputs
    ctx.save_for_backward(student, teacher, t_tensor, row_weight, mask, n_tensor)
    ctx.values = (temperature, dim, divisor)


def _backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    student, teacher, t_tensor, row_weight, mask, n_tensor = ctx.saved_tensors
    temperature, dim, divisor = ctx.values
    need = ctx.needs_input_grad[:2]
    grads = kd_kl_backward_op(
        upstream, student, teacher, temperature, t_tensor, dim, row_weight, mask, divisor, n_tensor, *need
    )
    return (*(g if n else None for g, n in zip(grads, need, strict=True)), *[None] * 8)


kd_kl_op.register_autograd(_backward, setup_context=_setup_context)
