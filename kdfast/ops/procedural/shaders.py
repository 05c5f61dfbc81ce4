"""The shader renderer: registration and choice of backend. Nothing here has a gradient."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kdfast.backend import resolve
from kdfast.ops.common.gradients import are_plain
from kdfast.ops.common.registered import registered_op
from kdfast.reference.procedural import shaders as reference
from kdfast.reference.procedural.shaders import Programs

__all__ = ["Programs", "render_shaders"]


_SCHEMA = (
    "(Tensor codes, Tensor values, Tensor rates, Tensor program, Tensor time, SymInt height, SymInt width, "
    "SymInt antialias, bool as_float) -> Tensor"
)


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels.procedural import shaders

    return shaders


@registered_op("render_shaders", _SCHEMA)
def _render_op(*flat: Any) -> Tensor:
    *tensors, height, width, antialias, as_float = flat
    return _render(Programs(*tensors), height, width, antialias, torch.float32 if as_float else torch.uint8)


def _render(programs: Programs, height: int, width: int, antialias: int, dtype: torch.dtype) -> Tensor:
    if resolve(*programs) == "reference":
        return reference.render(programs, height, width, antialias, dtype)
    images: Tensor = _kernels().render(*programs, height, width, antialias, dtype)
    return images


@_render_op.register_fake
def _(*flat: Any) -> Tensor:
    _, values, _, program, _, height, width, _, as_float = flat
    shape = (program.shape[0], 3, height, width)
    images: Tensor = values.new_empty(shape, dtype=torch.float32 if as_float else torch.uint8)
    return images


def render_shaders(programs: Programs, height: int, width: int, antialias: int, dtype: torch.dtype) -> Tensor:
    """Images ``[B, 3, height, width]`` of contiguous tensors; arguments are checked by the caller."""
    plain = are_plain(*programs) and not any([x.requires_grad for x in programs])
    if plain:  # the dispatcher takes as long as everything else
        return _render(programs, height, width, antialias, dtype)
    out: Tensor = _render_op(*programs, height, width, antialias, dtype == torch.float32)
    return out
