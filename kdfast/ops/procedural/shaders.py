"""The shader renderer: registration and choice of backend. Nothing here has a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.backend import resolve
from kdfast.reference.procedural import shaders as reference

__all__ = ["render_shaders"]


@torch.library.custom_op("kdfast::render_shaders", mutates_args=())
def _render_op(
    codes: Tensor,
    values: Tensor,
    rates: Tensor,
    program: Tensor,
    time: Tensor,
    height: int,
    width: int,
    antialias: int,
    as_float: bool,
) -> Tensor:
    dtype = torch.float32 if as_float else torch.uint8
    if resolve(codes, values, rates, program, time) == "reference":
        return reference.render(codes, values, rates, program, time, height, width, antialias, dtype)
    from kdfast.kernels.procedural import shaders as kernels

    images: Tensor = kernels.render(codes, values, rates, program, time, height, width, antialias, dtype)
    return images


@_render_op.register_fake
def _(
    codes: Tensor,
    values: Tensor,
    rates: Tensor,
    program: Tensor,
    time: Tensor,
    height: int,
    width: int,
    antialias: int,
    as_float: bool,
) -> Tensor:
    dtype = torch.float32 if as_float else torch.uint8
    return values.new_empty((program.shape[0], 3, height, width), dtype=dtype)


def render_shaders(
    codes: Tensor,
    values: Tensor,
    rates: Tensor,
    program: Tensor,
    time: Tensor,
    height: int,
    width: int,
    antialias: int,
    dtype: torch.dtype,
) -> Tensor:
    """Images ``[B, 3, height, width]``; arguments are checked by the caller."""
    out: Tensor = _render_op(
        codes, values, rates, program, time, height, width, antialias, dtype == torch.float32
    )
    return out
