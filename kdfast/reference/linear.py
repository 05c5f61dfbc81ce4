"""KL between two linear heads by its definition, all logits at once."""

from __future__ import annotations

import torch

from kdfast.reference import kl
from kdfast.reference.common import compute_dtype

__all__ = ["Head", "head_logits", "linear_kd"]

#: Hidden states ``[rows, H]``, weight ``[V, H]``, bias ``[V]`` or None.
Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def head_logits(head: Head, dtype: torch.dtype, softcap: float = 0.0) -> torch.Tensor:
    """Logits ``[rows, V]``, multiplied and returned in ``dtype``; c·tanh(x/c) of them for a ``softcap`` c."""
    hidden, weight, bias = head
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    logits = logits if bias is None else logits + bias.to(dtype)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


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
