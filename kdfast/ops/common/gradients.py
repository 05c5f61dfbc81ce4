"""What the losses' autograd functions share: buffers, second derivatives, and values that may be tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from kdfast.backend import resolve
from kdfast.reference.native import PLAIN

#: A host float, or a 0-d tensor that is read on the device.
Value = torch.Tensor | float
# Asked for at every call: three look-ups each time would show.
_transforms = torch._C._are_functorch_transforms_active
#: Of a tensor of a transform's that was kept after it is over, the one inside; others as they are.
unwrapped = torch._C._functorch.unwrap_if_dead
_mode, _PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY
is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_empty_like = torch.empty_like


def is_plain(student: torch.Tensor, teacher: torch.Tensor) -> bool:
    """Whether tensors are what they seem, with memory of their own, and this call runs once and now.

    Not so while torch.compile or make_fx traces, inside torch.func's transforms (vmap, grad, jvp), and for tensors of
    other classes (fake, distributed): all of these want to see operators that they know.
    """
    return has_values(student) and type(teacher) in PLAIN


def runs_now(student: torch.Tensor, teacher: torch.Tensor) -> bool:
    """:func:`is_plain` where the caller knows that torch.compile does not trace."""
    return type(student) in PLAIN and type(teacher) in PLAIN and not _transforms() and _mode(_PROXY) is None


def are_plain(first: torch.Tensor, *others: torch.Tensor) -> bool:
    """:func:`is_plain` of any number of tensors."""
    for tensor in others:
        if type(tensor) not in PLAIN:
            return False
    return has_values(first)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers may be looked at: nothing traces, transforms or fakes them."""
    return (
        not is_compiling()
        and not _transforms()  # the only way to tell, and what torch itself asks
        and _mode(_PROXY) is None
        and type(tensor) in PLAIN
    )


def apply(function: Any, *arguments: Any) -> Any:
    """``function.apply(*arguments)``, where no transform of torch.func is active in less time.

    ``torch.autograd.Function.apply`` goes through all arguments with a generator, for as long as a launch takes.
    """
    if _transforms():
        return function.apply(*arguments)
    return direct_apply(function)(*[unwrapped(x) if isinstance(x, torch.Tensor) else x for x in arguments])


@functools.cache
def direct_apply(function: Any) -> Any:
    """``function.apply`` for where no transform is active, without the look at each argument: see :data:`unwrapped`."""
    return super(torch.autograd.Function, function).apply


def save(ctx: Any, *tensors: torch.Tensor) -> None:
    """``ctx.save_for_backward``, of tensors made under ``torch.inference_mode`` too: :func:`saved` gives them back.

    Autograd refuses to save those, since they have no version that would tell of a change. They require no grad, so
    that to hold them makes no circle.
    """
    for tensor in tensors:
        if tensor.is_inference():
            ctx.unversioned = [x if x.is_inference() else None for x in tensors]
            ctx.save_for_backward(*(None if x.is_inference() else x for x in tensors))
            return
    ctx.unversioned = None
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> tuple[torch.Tensor, ...]:
    """What :func:`save` was given."""
    found: tuple[torch.Tensor, ...] = ctx.saved_tensors
    if ctx.unversioned is None:
        return found
    pairs = zip(found, ctx.unversioned, strict=True)
    return tuple(other if tensor is None else tensor for tensor, other in pairs)


def takes_reference(student: torch.Tensor, teacher: torch.Tensor) -> bool:
    """Where no kernel can run: by backend and dtype, and for tensors without memory of their own."""
    looked_into = not is_compiling() and not runs_now(student, teacher)
    return looked_into or resolve(student, teacher) == "reference"


def empty_gradients(
    needs: Sequence[bool], student: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Memory for the gradients that are needed."""
    return (
        _empty_like(student) if needs[0] else None,
        _empty_like(teacher) if needs[1] else None,
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


def join_value(value: float, tensor: torch.Tensor | None) -> Value:
    """What :func:`split_value` parted."""
    return value if tensor is None else tensor
