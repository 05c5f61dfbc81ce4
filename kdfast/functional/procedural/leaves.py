"""Dead-leaves images, a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.functional._checks import check_int, check_sizes, check_tensor
from kdfast.ops.procedural import leaves as ops
from kdfast.profiling import annotate

__all__ = ["render_leaves"]


@annotate("render_leaves")
def render_leaves(index: Tensor, shape: tuple[int, int], *, seed: int = 0, limit: int = 5000) -> Tensor:
    """Dead leaves: shapes fall on an image, each hiding what it covers, until no pixel is bare.

    Six shapes (circle, square, turned square, rectangle, triangle, quadrilateral) with uniform colours and centres;
    the radius is one of 200 between 0.03 and 1 of the shorter side, with p(r) ∝ r⁻³ − 1. No leaf is painted: a pixel
    looks for the last leaf on it that falls no later than the one that covers the image's last bare pixel, which is
    painter's order exactly. The same bits on every backend.

    Args:
        index: int64 ``[B]``: number of each image, at least 0; not checked on a GPU. Together with ``seed`` it decides
            the image.
        shape: Height and width in pixels.
        seed: An int from 0 to 2⁶³ − 1.
        limit: Leaves an image at most; what they leave bare is black.

    Returns:
        uint8 ``[B, 3, H, W]``, contiguous, on the index's device.

    Raises:
        TypeError: ``index`` is not an int64 tensor; a shape, seed or limit of no ints.
        ValueError: A shape or number out of what is said above.

    Source: "What Makes a Good Dataset for Knowledge Distillation?", the Leaves data set; its shapes and radius law.
    """
    check_tensor("index", index)
    if index.dtype != torch.int64:
        raise TypeError(f"index: got dtype {index.dtype}; torch.int64 is needed")
    if index.dim() != 1:
        raise ValueError(f"index: got shape {tuple(index.shape)}; [B] is needed")
    height, width = check_sizes("shape", shape)
    check_int("seed", seed, 0)
    check_int("limit", limit, 1, 2**31 - 1)
    if (
        index.device.type == "cpu"
        and index.numel()
        and not torch.compiler.is_compiling()
        and int(index.min()) < 0
    ):
        raise ValueError(f"index: got {int(index.min())}; must be at least 0")
    return ops.render_leaves(index.contiguous(), seed, height, width, limit)
