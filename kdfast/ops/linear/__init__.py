"""A divergence between two linear heads without their logits: a chunk of rows at a time, its gradient in place.

The forward computes loss and gradients, since only it has the chunk's logits. The first backward scales those where
they lie and hands them over, so that no gradient of a weight exists twice; a later one (``retain_graph``) computes
anew. Traces and torch.compile see one registered op, whose backward multiplies out of place.

A chunk is two matrix products, one launch of the divergence's own row loss (:mod:`kdfast.ops.kl`, ``pair``,
``topk``), labels included where it is the forward KL divergence and by a launch of their own elsewhere, and a product
a gradient.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from kdfast.backend import resolve
from kdfast.kernels.linear import chunks_alive, default_chunk_rows
from kdfast.ops.common.gradients import has_values
from kdfast.ops.common.registered import registered_op
from kdfast.ops.linear.chunks import autocasts, compute, definition
from kdfast.ops.linear.job import SCHEMA, Job, flat, job_of
from kdfast.profiling import annotate

__all__ = ["Job", "autocasts", "chunks_alive", "default_chunk_rows", "fused_linear_kd"]

Tensor = torch.Tensor
T = TypeVar("T")
#: Stands where autograd keeps the tensor.
_SAVED: Any = None


def fused_linear_kd(job: Job, chunk_rows: int) -> Tensor:
    """The loss over ``divisor``, with gradients to the student's hidden states, weight and bias."""
    student = job.hidden, job.weight, job.bias
    if torch._C._are_functorch_transforms_active():  # vmap and grad want to see operators that they know
        return definition(job)
    recording = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student)
    if not has_values(job.hidden):
        needs = [recording and x is not None and x.requires_grad for x in student]
        out: Tensor = fused_linear_kd_op(*flat(job), chunk_rows, *needs)[0]
    elif recording:
        rest = job._replace(hidden=_SAVED, weight=_SAVED, bias=_SAVED)
        out = _Fused.apply(*student, rest, chunk_rows)  # type: ignore[no-untyped-call]
    else:
        out = compute(job, chunk_rows, (False, False, False))[0]
    return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, chunk_rows: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.job, ctx.chunk_rows, ctx.like = job, chunk_rows, weight.dtype
        job = job._replace(hidden=hidden, weight=weight, bias=bias)
        loss, *ctx.grads = compute(job, chunk_rows, ctx.needs_input_grad[:3])
        return loss

    @staticmethod
    @annotate("fused_linear_kd_loss.backward")
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(_ONCE)
        needs = ctx.needs_input_grad[:3]
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            hidden, weight, bias = ctx.saved_tensors
            job = ctx.job._replace(hidden=hidden, weight=weight, bias=bias)
            grads = compute(job, ctx.chunk_rows, needs)[1:]
        like = ctx.like
        scaled = [
            grad.mul_(upstream).to(like) if need else None for grad, need in zip(grads, needs, strict=True)
        ]
        return (*scaled, None, None)


_ONCE = (
    "fused_linear_kd_loss: create_graph=True needs second derivatives, which a loss without logits does not keep; "
    "compute the logits and call divergence_loss or kd_kl_div"
)


@registered_op("fused_linear_kd", SCHEMA)
def fused_linear_kd_op(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``kdfast::fused_linear_kd``: loss and gradients of hidden states, weight and bias (empty if not needed)."""
    job, chunk_rows, needs = job_of(given[:-4]), given[-4], given[-3:]
    if any(needs) and resolve(job.hidden, job.weight) == "reference":
        return _apart(lambda: compute(job, chunk_rows, needs))
    return compute(job, chunk_rows, needs)


def _apart(call: Callable[[], T]) -> T:
    """What a call returns, made in a thread of its own.

    The reference differentiates by torch.func, which cannot work where torch.compile has put its own listener over the
    ops that it runs (it looks whose memory their outputs are): torch leaves out torch.func's keys there, a thread at a
    time.
    """
    made: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                made.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return made[0]


@fused_linear_kd_op.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    job, (need_hidden, need_weight, need_bias) = job_of(given[:-4]), given[-3:]
    new, like = job.hidden.new_empty, job.kept
    return (
        new((), dtype=job.dtype),
        torch.empty_like(job.hidden, dtype=like) if need_hidden else new(0),
        new(job.weight.shape, dtype=like) if need_weight else new(0, dtype=like),
        new(job.weight.shape[:1], dtype=like) if need_bias else new(0, dtype=like),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-3:]
    ctx.inputs, ctx.like = len(inputs), job_of(inputs[:-4]).weight.dtype
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(_ONCE)
    saved = ctx.saved_tensors
    grads = [
        (grad * upstream).to(ctx.like) if need else None for grad, need in zip(saved, ctx.needs, strict=True)
    ]
    return (*grads, *[None] * (ctx.inputs - 3))


fused_linear_kd_op.register_autograd(_backward, setup_context=_setup_context)
