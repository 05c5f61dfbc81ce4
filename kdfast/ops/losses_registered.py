"""The registered ops of the KL family: what torch.compile sees. The eager path is losses.py.

A backward always recomputes, out of place. Outputs are fresh memory, never a view of an input.
"""

from __future__ import annotations

from typing import Any

import torch

from kdfast.backend import resolve
from kdfast.ops._gradients import Value, empty_gradients
from kdfast.ops.losses import Labels, compute_statistics
from kdfast.reference import losses as reference_losses
from kdfast.reference.kl_closed import kd_kl_gradients

__all__ = ["distillation_backward_op", "distillation_op", "kd_kl_backward_op", "kd_kl_op", "kd_statistics_op"]


def _join(value: float, tensor: torch.Tensor | None) -> Value:
    return value if tensor is None else tensor


def _forward(
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
    if resolve(student, teacher) == "reference":
        out = reference_losses.kd_kl(
            student, teacher, temperature, dim, row_weight, mask, divisor, reduce, labels
        )
        return out.clone()
    from kdfast.kernels import losses as kernels

    scale = kernels.Scale(temperature, divisor, row_weight, mask)
    result: torch.Tensor = kernels.kd_kl(
        student, teacher, dim, scale, reduce=reduce, want_rows=not reduce, labels=labels
    )
    return result


def _gradients(
    upstream: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: Value,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: Value,
    need: tuple[bool, bool],
    labels: Labels | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of student and teacher; an empty tensor where none is needed."""
    grads = empty_gradients(need, student, teacher)
    if resolve(student, teacher) == "reference":
        computed = kd_kl_gradients(
            upstream, student, teacher, temperature, dim, row_weight, mask, divisor, labels
        )
        for grad, value in zip(grads, computed, strict=True):
            if grad is not None:
                grad.copy_(value)
    else:
        from kdfast.kernels import losses as kernels

        kernels.kd_kl(
            student,
            teacher,
            dim,
            kernels.Scale(temperature, divisor, row_weight, mask),
            reduce=False,
            want_rows=False,
            grad_student=grads[0],
            grad_teacher=grads[1],
            upstream=upstream.contiguous(),
            labels=labels,
        )
    first, second = (student.new_empty(0) if grad is None else grad for grad in grads)
    return first, second


def _fake_forward(student: torch.Tensor, teacher: torch.Tensor, dim: int, reduce: bool) -> torch.Tensor:
    shape = () if reduce else student.shape[:dim] + student.shape[dim + 1 :]
    return student.new_empty(shape, dtype=reference_losses.compute_dtype(student, teacher))


def _fake_gradients(
    student: torch.Tensor, teacher: torch.Tensor, need_student: bool, need_teacher: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(student) if need_student else student.new_empty(0),
        torch.empty_like(teacher) if need_teacher else student.new_empty(0),
    )


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
    labels = None
    return _forward(student, teacher, t, dim, row_weight, mask, n, reduce, labels)


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
    return _fake_forward(student, teacher, dim, reduce)


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
    """``kdfast::kd_kl_backward``: see :func:`_gradients`."""
    t, n = _join(temperature, temperature_tensor), _join(divisor, divisor_tensor)
    labels = None
    return _gradients(
        upstream, student, teacher, t, dim, row_weight, mask, n, (need_student, need_teacher), labels
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
    return _fake_gradients(student, teacher, need_student, need_teacher)


@torch.library.custom_op("kdfast::distillation", mutates_args=())
def distillation_op(
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
    label: torch.Tensor,
    factor: torch.Tensor,
    second: torch.Tensor | None,
    second_factor: torch.Tensor | None,
    smoothing: float,
) -> torch.Tensor:
    """``kdfast::distillation``: the same with hard labels."""
    t, n = _join(temperature, temperature_tensor), _join(divisor, divisor_tensor)
    labels = Labels(label, factor, second, second_factor, smoothing)
    return _forward(student, teacher, t, dim, row_weight, mask, n, reduce, labels)


@distillation_op.register_fake
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
    label: torch.Tensor,
    factor: torch.Tensor,
    second: torch.Tensor | None,
    second_factor: torch.Tensor | None,
    smoothing: float,
) -> torch.Tensor:
    return _fake_forward(student, teacher, dim, reduce)


@torch.library.custom_op("kdfast::distillation_backward", mutates_args=())
def distillation_backward_op(
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
    label: torch.Tensor,
    factor: torch.Tensor,
    second: torch.Tensor | None,
    second_factor: torch.Tensor | None,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``kdfast::distillation_backward``: see :func:`_gradients`."""
    t, n = _join(temperature, temperature_tensor), _join(divisor, divisor_tensor)
    labels = Labels(label, factor, second, second_factor, smoothing)
    return _gradients(
        upstream, student, teacher, t, dim, row_weight, mask, n, (need_student, need_teacher), labels
    )


@distillation_backward_op.register_fake
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
    label: torch.Tensor,
    factor: torch.Tensor,
    second: torch.Tensor | None,
    second_factor: torch.Tensor | None,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_gradients(student, teacher, need_student, need_teacher)


# The arguments after `divisor_tensor`: `reduce`, and for the op with labels those.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    tensors = [value if isinstance(value, torch.Tensor) else None for value in inputs]
    ctx.save_for_backward(*tensors)
    ctx.values = [None if isinstance(value, torch.Tensor) else value for value in inputs]


def _inputs(ctx: Any) -> list[Any]:
    return [
        value if tensor is None else tensor
        for tensor, value in zip(ctx.saved_tensors, ctx.values, strict=True)
    ]


def _backward_of(op: Any) -> Any:
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = _inputs(ctx)
        need = ctx.needs_input_grad[:2]
        grads = op(upstream, *inputs[:9], *need, *inputs[10:])
        return (*(g if n else None for g, n in zip(grads, need, strict=True)), *[None] * (len(inputs) - 2))

    return backward


kd_kl_op.register_autograd(_backward_of(kd_kl_backward_op), setup_context=_setup_context)
distillation_op.register_autograd(_backward_of(distillation_backward_op), setup_context=_setup_context)


@torch.library.custom_op("kdfast::kd_statistics", mutates_args=())
def kd_statistics_op(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    temperature_tensor: torch.Tensor | None,
    dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``kdfast::kd_statistics``: KL, the teacher's class, its probability, agreement."""
    return compute_statistics(student, teacher, _join(temperature, temperature_tensor), dim)


@kd_statistics_op.register_fake
def _(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    temperature_tensor: torch.Tensor | None,
    dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = student.shape[:dim] + student.shape[dim + 1 :]
    value = student.new_empty(shape, dtype=reference_losses.compute_dtype(student, teacher))
    return (
        value,
        student.new_empty(shape, dtype=torch.int64),
        torch.empty_like(value),
        student.new_empty(shape, dtype=torch.bool),
    )
