"""Uniform noise: images that know nothing of any data set."""

from __future__ import annotations

import numpy as np
import torch


def uniform_noise(n: int, shape: tuple[int, int], *, seed: int, start: int = 0) -> torch.Tensor:
    """Images whose pixels are independent and uniform over all 256 values.

    Image ``i`` depends on ``(seed, start + i)`` alone, so that a set can be made in pieces.

    Args:
        n: Number of images.
        shape: Height and width.
        seed: At least 0.
        start: Index of the first image.

    Returns:
        uint8 ``[n, 3, H, W]``.

    Raises:
        ValueError: An argument is out of range.
    """
    if n < 0 or start < 0 or seed < 0:
        raise ValueError(f"n, start, seed: got {n}, {start}, {seed}; must be at least 0")
    if min(shape) < 1:
        raise ValueError(f"shape: got {shape}; must be positive")
    images = np.empty((n, 3, *shape), np.uint8)
    for i in range(n):
        images[i] = np.random.default_rng([seed, start + i]).integers(0, 256, (3, *shape), dtype=np.uint8)
    return torch.from_numpy(images)
