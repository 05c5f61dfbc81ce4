"""KL between two linear heads: the definition, all logits at once, and what the op takes of it for one chunk."""

from __future__ import annotations

import torch

from kdfast.reference import kl
from kdfast.reference.common import compute_dtype, finish

__all__ = ["Head", "head_logits", "linear_kd", "logits_kd"]

#: Hidden states ``[rows, H]``, weight ``[V, H]``, bias ``[V]`` or None.
Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def head_logits(head: Head, dtype: torch.dtype) -> torch.Tensor:
    """Logits ``[rows, V]``, multiplied and returned in ``dtype``."""
    hidden, weight, bias = head
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits + bias.to(dtype)


def linear_kd(
    student: Head,
    teacher: Head,
    temperature: torch.Tensor | float,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: torch.Tensor | float,
) -> torch.Tensor:
    """T²·w·KL(teacher ‖ student) of two heads' logits, summed over rows, over ``divisor``; differentiable."""
    dtype = compute_dtype(student[0], teacher[0])
    logits = head_logits(student, dtype), head_logits(teacher, dtype)
    return kl.kd_kl(*logits, temperature, 1, row_weight, mask, divisor, True)


def logits_kd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: torch.Tensor | float,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    want_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same of a chunk's logits ``[rows, V]``, not yet divided, and its gradient in closed form."""
    rows, gradient, _ = kl.kd_kl_closed(student, teacher, temperature, 1, want_gradient, False)
    loss = finish(rows, temperature, row_weight, mask, 1.0, True)
    if gradient is None:
        return loss, None
    # T² of the loss over T of the softmax; nothing reads the gradient but the caller.
    factor = temperature if row_weight is None else row_weight.to(gradient.dtype).unsqueeze(1) * temperature
    if not (isinstance(factor, float) and factor == 1.0):
        gradient.mul_(factor)
    return loss, gradient if mask is None else gradient.masked_fill_(~mask.unsqueeze(1), 0.0)
