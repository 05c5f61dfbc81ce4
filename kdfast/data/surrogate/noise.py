"""Gaussian noise with a data set's channel statistics: the weakest surrogate, hence the yardstick."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def noise(
    n: int,
    shape: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    start: int = 0,
) -> torch.Tensor:
    """Images whose pixels are independent draws from N(mean, std²) of their channel, clipped to [0, 1].

    Image ``i`` depends on ``(seed, start + i)`` alone, so that a set can be made in pieces.

    Args:
        n: Number of images.
        shape: Height and width.
        mean, std: Per channel, in units of [0, 1].
        seed: At least 0.
        start: Index of the first image.

    Returns:
        uint8 ``[n, 3, H, W]``.

    Raises:
        ValueError: An argument is out of range.

    Source: "What Makes a Good Dataset for Knowledge Distillation?", the noise data set.
    """
    if n < 0 or start < 0 or seed < 0:
        raise ValueError(f"n, start, seed: got {n}, {start}, {seed}; must be at least 0")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean, std: got {len(mean)} and {len(std)} values; must be 3, one a channel")
    if min(std) < 0:
        raise ValueError(f"std: got {list(std)}; must not be negative")
    height, width = shape
    if height < 1 or width < 1:
        raise ValueError(f"shape: got {shape}; must be positive")
    centre = np.asarray(mean, np.float32).reshape(3, 1, 1)
    spread = np.asarray(std, np.float32).reshape(3, 1, 1)
    images = np.empty((n, 3, height, width), np.uint8)
    for i in range(n):
        draws = np.random.default_rng([seed, start + i]).standard_normal((3, height, width), dtype=np.float32)
        images[i] = np.rint((centre + spread * draws).clip(0, 1) * 255)
    return torch.from_numpy(images)
