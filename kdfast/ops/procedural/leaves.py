"""The dead-leaves renderer: registration and choice of backend. Nothing here has a gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kdfast.backend import resolve
from kdfast.ops.common.registered import registered_op
from kdfast.reference.procedural import leaves as reference

__all__ = ["render_leaves"]


@functools.cache
def _law(pinned: bool) -> tuple[Tensor, Tensor]:
    """The radii and their law in host memory; pinned, they are copied to a GPU without waiting, and by a graph, too.

    No copy is kept there: under torch.compile it would lie in the pool of somebody else's graph.
    """
    radii, law = reference.radius_law()
    return (radii.pin_memory(), law.pin_memory()) if pinned else (radii, law)


@registered_op("render_leaves")
def _render_op(index: Tensor, seed: int, height: int, width: int, limit: int) -> Tensor:
    if resolve(index) == "reference":
        return reference.render(seed, index, height, width, limit)
    from kdfast.kernels.procedural import leaves as kernels

    law = (part.to(index.device, non_blocking=True) for part in _law(index.is_cuda))
    images: Tensor = kernels.render(index, *law, seed, height, width, limit)
    return images


@_render_op.register_fake
def _(index: Tensor, seed: int, height: int, width: int, limit: int) -> Tensor:
    return index.new_empty((index.shape[0], 3, height, width), dtype=torch.uint8)


def render_leaves(index: Tensor, seed: int, height: int, width: int, limit: int) -> Tensor:
    """uint8 ``[B, 3, height, width]``; arguments are checked by the caller."""
    out: Tensor = _render_op(index, seed, height, width, limit)
    return out
