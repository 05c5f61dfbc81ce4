"""How varied a set is, and how much of it is there twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

_CELLS = 12  # sides of the picture that near-duplicates share
_BITS_APART = 0  # a difference hash has to agree in full


def effective_directions(features: NDArray[np.floating[Any]]) -> float:
    """Over how many directions a cloud of points spreads: the effective rank of its covariance.

    exp(H(λ / Σλ)) of the covariance's eigenvalues (Roy and Vetterli 2007): 1 for points on a line, D for a ball in D
    dimensions; neither scale nor position matters.

    Args:
        features: ``[N, D]``.

    Returns:
        Between 1 and min(N − 1, D); 0 if the points do not differ, or are fewer than two.
    """
    points = np.asarray(features, dtype=np.float64)
    if points.ndim != 2:
        raise ValueError(f"features: got shape {list(points.shape)}; must be [N, D]")
    if len(points) < 2:
        return 0.0
    values = np.linalg.svd(points - points.mean(0), compute_uv=False) ** 2
    total = values.sum()
    if total <= 1e-12 * max(1.0, float((points**2).sum())):
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def class_spread(features: NDArray[np.floating[Any]], classes: NDArray[np.integer[Any]]) -> float:
    """How far images of one class lie apart, as a share of how far all lie apart.

    √(mean squared distance to the own class's mean / mean squared distance to the mean of the class means), classes
    counting alike: small when a class is one clump.

    Args:
        features: ``[N, D]``.
        classes: ``[N]``.

    Returns:
        At least 0; infinite if there is only one class.
    """
    points = np.asarray(features, dtype=np.float64)
    found = [points[classes == label] for label in np.unique(classes)]
    means = np.stack([group.mean(0) for group in found])
    within = np.mean([((group - mean) ** 2).sum(1).mean() for group, mean in zip(found, means)])
    between = ((means - means.mean(0)) ** 2).sum(1).mean()
    return float(np.sqrt(within / between)) if between > 0 else float("inf")


def picture_hashes(images: torch.Tensor) -> list[bytes]:
    """A key for each image that near-duplicates share: the same picture, compressed or scaled a little differently.

    Signs of the brightness steps on a 12 × 12 grid, and each channel's mean in 16 levels.

    Args:
        images: Float ``[B, 3, H, W]`` in [0, 1].
    """
    grey = images.mean(1, keepdim=True)
    small = F.interpolate(grey, size=(_CELLS, _CELLS), mode="bilinear", antialias=True, align_corners=False)[
        :, 0
    ]
    # A step has to be worth a grey level of 256: rounding alone makes none.
    across, down = small[:, :, 1:] - small[:, :, :-1], small[:, 1:] - small[:, :-1]
    steps = torch.cat([across.flatten(1), down.flatten(1)], 1)
    signs = (steps / (2 / 255)).round().clamp(-1, 1).to(torch.int8).cpu().numpy()
    colours = (images.mean((2, 3)) * 15.999).to(torch.uint8).cpu().numpy()
    return [sign.tobytes() + colour.tobytes() for sign, colour in zip(signs, colours)]


def duplicate_groups(keys: list[bytes]) -> list[NDArray[np.int64]]:
    """Rows that share a key, largest group first; rows alone are left out."""
    rows: dict[bytes, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    groups = [np.array(group) for group in rows.values() if len(group) > 1]
    return sorted(groups, key=len, reverse=True)
