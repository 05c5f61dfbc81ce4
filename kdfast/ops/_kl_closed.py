"""Autograd over the closed form of the KL divergence, for eager calls on the reference."""

from __future__ import annotations

from typing import Any

import torch

from kdfast.ops._gradients import Value, differentiable_gradients
from kdfast.profiling import annotate
from kdfast.reference.kl_closed import kd_kl_closed
from kdfast.reference.losses import kd_kl


def usable(student: torch.Tensor, teacher: torch.Tensor) -> bool:
    """Whether nothing looks inside: torch.compile, vmap and float64 take the differentiable form."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.float64 in (student.dtype, teacher.dtype)
    )


class KLClosed(torch.autograd.Function):
    """T²·w·KL of each row over the divisor, summed when ``reduce``; arguments as in ``ops.losses.kd_kl``."""

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
        needs = ctx.needs_input_grad[:2]
        rows, grad_student, grad_teacher = kd_kl_closed(student, teacher, temperature, dim, *needs)
        scale = torch.full_like(rows, 1.0) * (temperature / divisor)  # T² of the loss over T of the softmax
        if row_weight is not None:
            scale *= row_weight
        rows = rows * scale * temperature
        if mask is not None:  # a masked row is 0 even where its logits are NaN
            rows = rows.masked_fill_(~mask, 0.0)
        ctx.save_for_backward(student, teacher, grad_student, grad_teacher, scale)
        ctx.arguments = (temperature, dim, row_weight, mask, divisor, reduce)
        return rows.sum() if reduce else rows

    @staticmethod
    @annotate("kd_kl_div.backward")
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, *grads, scale = ctx.saved_tensors
        temperature, dim, row_weight, mask, divisor, reduce = ctx.arguments
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph=True: the plain form differentiates to any order
            out = kd_kl(student, teacher, temperature, dim, row_weight, mask, divisor, reduce)
            return (*differentiable_gradients(out, (student, teacher), needs, upstream), *[None] * 6)
        factor = (scale * upstream).unsqueeze(dim)
        keep = None if mask is None else mask.unsqueeze(dim)
        results: list[torch.Tensor | None] = []
        for grad, like in zip(grads, (student, teacher), strict=True):
            # Out of place, in float32, rounded once: a second backward must find what the first one found.
            scaled = None if grad is None else (grad * factor).to(like.dtype)
            results.append(scaled if scaled is None or keep is None else scaled.masked_fill_(~keep, 0.0))
        return (*results, *[None] * 6)
