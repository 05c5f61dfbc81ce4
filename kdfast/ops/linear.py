"""KL between two linear heads without their logits: a chunk of rows at a time, its gradient in place.

The forward computes loss and gradients, since only it has the chunk's logits, and keeps these in float32; the backward
multiplies them by the upstream gradient, out of place, and rounds them. It is one registered op, in eager mode too: a
language model's head costs milliseconds, the dispatcher microseconds.
"""

from __future__ import annotations

from typing import Any

import torch

from kdfast.backend import resolve
from kdfast.kernels.linear import default_chunk_rows
from kdfast.ops.common.gradients import Value, join_value, split_value
from kdfast.reference import linear as reference
from kdfast.reference.common import compute_dtype

__all__ = ["default_chunk_rows", "fused_linear_kd"]


def fused_linear_kd(
    student: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    teacher: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    temperature: Value,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: Value,
    chunk_rows: int,
) -> torch.Tensor:
    """T²·w·KL summed over rows, over ``divisor``; arguments are checked by the caller.

    Args:
        student: Hidden states ``[rows, H]``, weight ``[V, H]``, bias ``[V]`` or None; of one dtype.
        teacher: The same, of its own width and dtype. Gets no gradient.
        temperature: T, a float or a 0-d tensor on the device.
        row_weight: ``[rows]`` or None.
        mask: bool ``[rows]`` or None.
        divisor: A float or a 0-d tensor on the device.
        chunk_rows: Rows whose logits are alive at a time.
    """
    recording = torch.is_grad_enabled()
    needs = [recording and x is not None and x.requires_grad for x in student]
    loss: torch.Tensor = fused_linear_kd_op(
        *student,
        *teacher,
        *split_value(temperature),
        row_weight,
        mask,
        *split_value(divisor),
        chunk_rows,
        *needs,
    )[0]
    return loss


def _multiply(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b, accumulated and returned in ``dtype``: a half-precision product is not rounded on its way out."""
    if a.device.type == "cuda" and a.dtype == b.dtype and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    logits = _multiply(hidden, weight.t(), dtype)
    return logits if bias is None else logits.add_(bias)


def _chunk(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: Value,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    want_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One chunk's loss, and its gradient with respect to the student's logits, which it overwrites."""
    if resolve(student, teacher) == "reference":
        return reference.logits_kd(student, teacher, temperature, row_weight, mask, want_gradient)
    from kdfast.kernels import kl as kernels

    # In place where rows begin on 16 bytes; elsewhere a kernel may read a neighbouring row's edge.
    aligned = student.shape[1] % 8 == 0
    gradient = (student if aligned else torch.empty_like(student)) if want_gradient else None
    rows = kernels.kd_kl(
        student,
        teacher,
        1,
        kernels.Scale(temperature, 1.0, row_weight, mask),
        reduce=False,
        grad_student=gradient,
    )
    return rows.sum(), gradient


@torch.library.custom_op("kdfast::fused_linear_kd", mutates_args=())
def fused_linear_kd_op(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    temperature: float,
    temperature_tensor: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: float,
    divisor_tensor: torch.Tensor | None,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``kdfast::fused_linear_kd``: loss and gradients of hidden states, weight and bias (empty if not needed)."""
    dtype = compute_dtype(student_hidden, teacher_hidden)
    heat = join_value(temperature, temperature_tensor)
    scale = 1.0 / (divisor if divisor_tensor is None else divisor_tensor.to(dtype))
    want_gradient = need_hidden or need_weight or need_bias
    new = student_hidden.new_zeros
    loss = new((), dtype=dtype)
    # Unrounded: what a loss's scale multiplies first (torch.amp.GradScaler) is rounded once, in the backward.
    grad_hidden = torch.empty_like(student_hidden, dtype=dtype) if need_hidden else new(0)
    grad_weight = new(student_weight.shape, dtype=dtype) if need_weight else new(0)
    grad_bias = new(student_weight.shape[:1], dtype=dtype) if need_bias else new(0)
    for start in range(0, student_hidden.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        part, gradient = _chunk(
            _logits(student_hidden[rows], student_weight, student_bias, dtype),
            _logits(teacher_hidden[rows], teacher_weight, teacher_bias, dtype),
            heat,
            None if row_weight is None else row_weight[rows],
            None if mask is None else mask[rows],
            want_gradient,
        )
        loss += part
        if gradient is None:
            continue
        if need_bias:
            grad_bias += gradient.sum(0)
        # Before the divisor, so that a half-precision gradient stays clear of the smallest numbers.
        gradient = gradient.to(student_weight.dtype)
        if need_hidden:
            grad_hidden[rows] = _multiply(gradient, student_weight, dtype) * scale
        if need_weight and gradient.dtype == dtype:
            grad_weight.addmm_(gradient.t(), student_hidden[rows])
        elif need_weight:
            grad_weight += _multiply(gradient.t(), student_hidden[rows], dtype)
    return loss * scale, grad_hidden, grad_weight.mul_(scale), grad_bias.mul_(scale)


@fused_linear_kd_op.register_fake
def _(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor,
    *others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    need_hidden, need_weight, need_bias = others[-3:]
    dtype = compute_dtype(student_hidden, teacher_hidden)
    new = student_hidden.new_empty
    return (
        new((), dtype=dtype),
        torch.empty_like(student_hidden, dtype=dtype) if need_hidden else new(0),
        new(student_weight.shape, dtype=dtype) if need_weight else new(0),
        new(student_weight.shape[:1], dtype=dtype) if need_bias else new(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.needs, ctx.dtype = inputs[-3:], inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "fused_linear_kd_loss: create_graph=True needs second derivatives, which a loss without logits does "
            "not keep; compute the logits and call kd_kl_div"
        )
    saved = ctx.saved_tensors
    grads = [
        _scaled(grad, upstream, ctx.dtype) if need else None
        for grad, need in zip(saved, ctx.needs, strict=True)
    ]
    return (*grads, *[None] * 13)


def _scaled(grad: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``grad·upstream`` in ``dtype``, rounded once; without a product in between, which takes V·H floats more."""
    if torch.compiler.is_compiling():  # the compiler fuses the two
        return (grad * upstream).to(dtype)
    return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))


fused_linear_kd_op.register_autograd(_backward, setup_context=_setup_context)
