"""Shader programs to images, a batch in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.documents import shown
from kdfast.functional._checks import check_int, check_sizes, check_tensor, elsewhere, on_host
from kdfast.ops.procedural import shaders as ops
from kdfast.profiling import annotate
from kdfast.reference.procedural.shaders import SLOTS, Op

__all__ = ["render_shaders"]

#: Samples a pixel and side.
MAX_ANTIALIAS = 8


@annotate("render_shaders")
def render_shaders(
    codes: Tensor,
    values: Tensor,
    rates: Tensor,
    program: Tensor,
    time: Tensor,
    shape: tuple[int, int],
    *,
    antialias: int = 1,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Render a batch of shader programs from their table, one launch on a GPU.

    :func:`kdfast.data.surrogate.shaders` is the easy way in; this is for a table that stays on the device. Every
    operation is rounded alike on every backend, so an image is the same to the last bit wherever it is rendered (the
    GPU compiles without fused multiply-add).

    Args:
        codes: int32 ``[P, L]``: the operations of P programs, 0 behind a program's end.
        values: float32 ``[P, L, 16]``: their numbers at time 0. What is repeated is repeated 16 times at most.
        rates: float32 ``[P, L, 16]``: what a unit of time adds to each.
        program: int64 ``[B]``: which program each image is of; not checked on a GPU.
        time: float32 ``[B]``: at which time.
        shape: Height and width in pixels; the shorter side spans [−1, 1].
        antialias: Samples a pixel and side: 2 averages four.
        dtype: ``torch.uint8``, or ``torch.float32`` for [0, 1].

    Returns:
        ``[B, 3, H, W]``, contiguous, on the table's device.

    Raises:
        TypeError: A tensor of another dtype.
        ValueError: A shape, device or number out of what is said above.
    """
    wanted = {
        "codes": (codes, torch.int32),
        "values": (values, torch.float32),
        "rates": (rates, torch.float32),
        "program": (program, torch.int64),
        "time": (time, torch.float32),
    }
    for name, (tensor, kind) in wanted.items():
        check_tensor(name, tensor)
        if tensor.dtype != kind:
            raise TypeError(f"{name}: got dtype {tensor.dtype}; {kind} is needed")
        if tensor.device != codes.device:
            raise elsewhere(name, tensor, "codes", codes.device)
    if codes.dim() != 2 or codes.shape[0] < 1:
        raise ValueError(f"codes: got shape {tuple(codes.shape)}; [P, L] with P of at least 1 is needed")
    for name, tensor in (("values", values), ("rates", rates)):
        if tensor.shape != (*codes.shape, SLOTS):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; {(*codes.shape, SLOTS)} is needed")
    if program.dim() != 1 or time.shape != program.shape:
        raise ValueError(
            f"program, time: got shapes {tuple(program.shape)} and {tuple(time.shape)}; [B] is needed"
        )
    height, width = check_sizes("shape", shape)
    check_int("antialias", antialias, 1, MAX_ANTIALIAS)
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"dtype: got {shown(dtype)}; torch.uint8 or torch.float32 is needed")
    if program.numel() and on_host(program):
        low, high = int(program.min()), int(program.max())
        if low < 0 or high >= codes.shape[0]:
            raise ValueError(f"program: got {low} to {high}; accepted: 0 to {codes.shape[0] - 1}")
        for name, numbers in (("values", values), ("rates", rates), ("time", time)):
            if not bool(numbers.isfinite().all()):
                raise ValueError(f"{name}: got numbers that are not finite; finite ones are needed")
        if bool(((codes < 0) | (codes >= len(Op))).any()):
            raise ValueError(
                f"codes: got {int(codes.min())} to {int(codes.max())}; accepted: 0 to {len(Op) - 1}"
            )
    programs = ops.Programs(
        codes.contiguous(), values.contiguous(), rates.contiguous(), program.contiguous(), time.contiguous()
    )
    return ops.render_shaders(programs, height, width, antialias, dtype)
