"""The denoising step without autograd: its arguments, and the choice of backend."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kdfast import backend
from kdfast.ops.denoise import native
from kdfast.reference import denoise as reference
from kdfast.reference.denoise import NO_GUIDANCE, Guidance, iteration_order, pack_bits


@dataclass(frozen=True)
class Call:
    """One step's arguments that no gradient flows to, by the names that kernels and reference give them.

    Attributes:
        order: The iteration order of ``mask``; y is laid out in it. None: as the sample.
        mask: Bits of an earlier clamp, applied instead of clamping.
    """

    table: Tensor
    step: int | Tensor
    dtype: torch.dtype
    guidance: Guidance = NO_GUIDANCE
    seed: int | Tensor | None = None
    learned_variance: bool = False
    clip: float | None = None
    want_x0: bool = False
    x0_dtype: torch.dtype | None = None
    order: tuple[int, ...] | None = None
    mask: Tensor | None = None


@functools.cache
def _kernels() -> ModuleType:
    import kdfast.kernels.denoise as kernels

    return cast(ModuleType, kernels)


def implementation(*tensors: Tensor | None) -> Any:
    """The kernels, or the reference, whichever runs these tensors."""
    return _kernels() if backend.resolve(*tensors) == "triton" else reference


def run(
    call: Call,
    sample: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    history: Sequence[Tensor],
    *,
    want_mask: bool = False,
    next_dtype: torch.dtype | None = None,
    next_copies: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One step, below autograd."""
    inputs = [sample, model_output, *history] + ([] if noise is None else [noise])
    by = implementation(*inputs, call.table)
    options = {**vars(call), "next_dtype": next_dtype, "history": history, "noise": noise}
    plain = by is reference and call.mask is None and call.order is None
    if plain and native.fits(inputs, call.table, call.step, call.guidance, options):
        y, x0 = native.denoise_step(sample, model_output, **options)
        bits = None
        if want_mask and call.clip is not None:  # of what a clamp has hidden; y has to be what it is without
            options |= {"clip": None, "want_x0": True}
            m = cast(Tensor, native.denoise_step(sample, model_output, **options)[1])
            bits = pack_bits(m.abs() <= call.clip, iteration_order(m.shape, m.stride()))
        return y, x0, bits, None
    found = by.denoise_step(sample, model_output, want_mask=want_mask, next_copies=next_copies, **options)
    return cast(tuple[Tensor, Tensor | None, Tensor | None, Tensor | None], found)


class Like(NamedTuple):
    """Shape and dtype of a gradient; None where it is not wanted."""

    shape: torch.Size
    dtype: torch.dtype

    def empty(self, order: Sequence[int], device: torch.device, channels: int | None) -> Tensor:
        """Memory for a gradient of this tensor, its dimensions in ``order``."""
        gradient = reference.ordered_empty(self.shape, order, self.dtype, device)
        if channels is not None and len(self.shape) > 1 and self.shape[1] > channels:
            gradient.narrow(1, channels, self.shape[1] - channels).zero_()  # read by no step
        return gradient


def run_backward(
    call: Call,
    order: Sequence[int],
    sample: Like | None,
    model_output: Like | None,
    grad_y: Tensor,
    grad_m: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The step's gradients, below autograd."""
    channels = grad_y.shape[1] if grad_y.dim() > 1 else None
    gx = None if sample is None else sample.empty(order, grad_y.device, None)
    go = None if model_output is None else model_output.empty(order, grad_y.device, channels)
    implementation(grad_y, grad_m, call.table, gx, go).denoise_step_backward(
        grad_y,
        grad_m,
        call.table,
        call.step,
        grad_sample=gx,
        grad_output=go,
        order=order,
        guidance=call.guidance,
        mask=call.mask,
    )
    return gx, go
