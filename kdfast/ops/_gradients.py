"""What the losses' autograd functions share: buffers, second derivatives, and values that may be tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

#: A host float, or a 0-d tensor that is read on the device.
Value = torch.Tensor | float


def empty_gradients(
    needs: Sequence[bool], student: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Memory for the gradients that are needed."""
    return (
        torch.empty_like(student) if needs[0] else None,
        torch.empty_like(teacher) if needs[1] else None,
    )


def differentiable_gradients(
    out: torch.Tensor, inputs: Sequence[torch.Tensor], needs: Sequence[bool], upstream: torch.Tensor
) -> list[torch.Tensor | None]:
    """Gradients of ``out``, made of differentiable operators, that can be differentiated again.

    For a backward under create_graph=True; None stands where an input needs no gradient.
    """
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, upstream, create_graph=True))
    return [next(found) if need else None for need in needs]


def split_value(value: Value) -> tuple[float, torch.Tensor | None]:
    """A 0-d tensor and a float are different arguments to a schema: a value travels as (float, Tensor?)."""
    return (math.nan, value) if isinstance(value, torch.Tensor) else (value, None)
