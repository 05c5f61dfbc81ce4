"""The dead-leaves renderer: registration and choice of backend. Nothing here has a gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kdfast.backend import resolve
from kdfast.reference.procedural import leaves as reference

__all__ = ["render_leaves"]


@functools.cache
def _law(device: torch.device) -> tuple[Tensor, Tensor]:
    """The radii and their law on a device, copied once."""
    radii, law = reference.radius_law()
    return radii.to(device), law.to(device)


@torch.library.custom_op("kdfast::render_leaves", mutates_args=())
def _render_op(index: Tensor, seed: int, height: int, width: int, limit: int) -> Tensor:
    if resolve(index) == "reference":
        return reference.render(seed, index, height, width, limit)
    from kdfast.kernels.procedural import leaves as kernels

    images: Tensor = kernels.render(index, *_law(index.device), seed, height, width, limit)
    return images


@_render_op.register_fake
def _(index: Tensor, seed: int, height: int, width: int, limit: int) -> Tensor:
    return index.new_empty((index.shape[0], 3, height, width), dtype=torch.uint8)


def render_leaves(index: Tensor, seed: int, height: int, width: int, limit: int) -> Tensor:
    """uint8 ``[B, 3, height, width]``; arguments are checked by the caller."""
    out: Tensor = _render_op(index, seed, height, width, limit)
    return out
