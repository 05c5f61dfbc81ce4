"""Dead leaves: images of shapes that hide each other, with the edges and sizes of natural scenes and nothing else."""

from __future__ import annotations

import torch

from kdfast.ops.procedural.leaves import render_leaves


def leaves(
    n: int,
    shape: tuple[int, int],
    *,
    seed: int = 0,
    start: int = 0,
    limit: int = 5000,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Dead-leaves images: six shapes in uniform colours, painted until no pixel is bare.

    Image ``i`` depends on ``(seed, start + i)`` alone, and is the same on every backend. What the shapes are is said
    at :func:`kdfast.functional.render_leaves`.

    Args:
        n: Number of images.
        shape: Height and width.
        seed: At least 0.
        start: Index of the first image.
        limit: Leaves an image at most.
        device: Where to render.

    Returns:
        uint8 ``[n, 3, H, W]`` on ``device``.

    Raises:
        ValueError: An argument is out of range.

    Source: "What Makes a Good Dataset for Knowledge Distillation?", the Leaves data set.
    """
    if n < 0 or start < 0 or not 0 <= seed < 2**63:
        raise ValueError(f"n, start, seed: got {n}, {start}, {seed}; must be at least 0")
    if min(shape) < 1:
        raise ValueError(f"shape: got {shape}; must be positive")
    if limit < 1:
        raise ValueError(f"limit: got {limit}; must be at least 1")
    return render_leaves(torch.arange(start, start + n, device=device), seed, *shape, limit)
