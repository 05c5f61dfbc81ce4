"""One denoising step of float32 samples on a CPU, in the loop of csrc/denoise_loops.hpp, below autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops.common.host import runs_here
from kdfast.reference.denoise import Guidance
from kdfast.reference.native import PLAIN, address, extension

__all__ = ["denoise_step", "fits"]


def fits(
    inputs: Sequence[Tensor], table: Tensor, step: int | Tensor, guidance: Guidance, options: dict[str, Any]
) -> bool:
    """Whether the loop takes a step of these tensors, the sample and the model output first.

    What it leaves to the reference: other dtypes, samples of another layout, noise that the op makes itself, a variance
    that was learned, channels that are not guided, and the next model input.
    """
    sample = inputs[0]
    if (
        isinstance(step, Tensor)
        or options["seed"] is not None
        or options["learned_variance"]
        or options["next_dtype"] is not None
        or options["x0_dtype"] not in (None, torch.float32)
        or options["dtype"] is not torch.float32
        or sample.dim() < 2
        or not sample.numel()
        or (guidance.channels is not None and guidance.channels < sample.shape[1])
    ):
        return False
    for tensor in (*inputs, table):
        if tensor.dtype is not torch.float32 or type(tensor) not in PLAIN or tensor.device.type != "cpu":
            return False
    return sample.is_contiguous() and runs_here(sample)


def denoise_step(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int,
    *,
    guidance: Guidance,
    history: Sequence[Tensor],
    noise: Tensor | None,
    clip: float | None,
    want_x0: bool,
    **_looked_at: Any,
) -> tuple[Tensor, Tensor | None]:
    """y and the predicted x₀, if it is wanted. What lies otherwise than the sample is copied.

    What else a step is called with is such that :func:`fits`.
    """
    model_output = model_output.contiguous()
    history = [h.contiguous() for h in history]
    noise = None if noise is None else noise.contiguous()
    y = torch.empty_like(sample)
    x0 = torch.empty_like(sample) if want_x0 else None
    rows, outputs = sample.shape[0], model_output.shape[0]
    stride = model_output.stride(0)
    conditional, unconditional, half, scale = model_output.data_ptr(), 0, rows, 0.0
    if guidance.scale is not None:
        half, scale = outputs // 2, guidance.scale
        unconditional = conditional + half * stride * model_output.element_size()
        if not guidance.cond_first:
            conditional, unconditional = unconditional, conditional
    past = [h.data_ptr() for h in history]
    extension().denoise_step(
        [rows, sample.numel() // rows, half, stride],
        table.data_ptr() + step * table.stride(0) * table.element_size(),
        sample.data_ptr(),
        conditional,
        unconditional,
        scale,
        past + [0] * (3 - len(past)),
        address(noise),
        math.inf if clip is None else clip,
        y.data_ptr(),
        address(x0),
        torch.get_num_threads(),
    )
    return y, x0
