"""Augmentation of whole batches on their device: no loop over images, no copy to the host.

Every function takes its random numbers from the generator it is given, which lives on the images' device, and
works on images ``[B, 3, H, W]`` of any floating dtype. The input is never changed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F


class Mixed(NamedTuple):
    """Images made of two each.

    Attributes:
        images: ``[B, 3, H, W]``.
        partner: int64 ``[B]``, which row each image was mixed with: its labels are ``labels`` and
            ``labels[partner]``.
        lam: float32 ``[B]``, the share of the row's own image.
    """

    images: torch.Tensor
    partner: torch.Tensor
    lam: torch.Tensor


def random_flip(images: torch.Tensor, generator: torch.Generator, *, p: float = 0.5) -> torch.Tensor:
    """Mirror each image left to right with probability ``p``."""
    if not 0 <= p <= 1:
        raise ValueError(f"p: got {p}; must be in [0, 1]")
    _check(images)
    turned = _uniform(images, generator) < p
    return torch.where(turned[:, None, None, None], images.flip(-1), images)


def padded_crop(
    images: torch.Tensor, generator: torch.Generator, *, padding: int = 4, fill: float = 0.0
) -> torch.Tensor:
    """Shift each image by up to ``padding`` pixels each way, ``fill`` coming in from the edges.

    The same as padding by ``padding`` on every side and cutting the old size out at random.
    """
    if padding < 0:
        raise ValueError(f"padding: got {padding}; must be at least 0")
    _check(images)
    batch, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4, value=fill)
    device = images.device
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator, device=device)
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    sample = torch.arange(batch, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def mixup(
    images: torch.Tensor, generator: torch.Generator, *, alpha: float = 1.0, one_share: bool = False
) -> Mixed:
    """Blend each image with another row's: λx + (1 − λ)x', with λ ~ Beta(α, α) for each image and one
    permutation.

    Teacher and student must both see the result, so that the soft target is of the image that is there.

    Args:
        images: ``[B, 3, H, W]``.
        generator: On the images' device.
        alpha: Of the Beta distribution; 1 is uniform.
        one_share: The same λ for the whole batch, rather than one an image.
    """
    _check(images)
    if alpha <= 0:
        raise ValueError(f"alpha: got {alpha}; must be positive")
    if alpha == 1 and not one_share:
        lam = _uniform(images, generator)
    else:
        lam = _beta(alpha, 1 if one_share else len(images), generator).expand(len(images))
    partner = _permutation(images, generator)
    share = lam.to(images.dtype)[:, None, None, None]
    return Mixed(images[partner].lerp(images, share), partner, lam)


def cutmix(
    images: torch.Tensor, generator: torch.Generator, *, alpha: float = 1.0, one_box: bool = False
) -> Mixed:
    """Paste a box of another row's image into each (Yun et al. 2019).

    The box has √(1 − λ) of the image's sides, λ ~ Beta(α, α), about a uniform centre, clipped at the edges;
    the returned ``lam`` is what is left of the row's own image.

    Args:
        images: ``[B, 3, H, W]``.
        generator: On the images' device.
        alpha: Of the Beta distribution; 1 is uniform.
        one_box: The same box for the whole batch, as in the original, rather than one an image.
    """
    _check(images)
    if alpha <= 0:
        raise ValueError(f"alpha: got {alpha}; must be positive")
    height, width = images.shape[-2:]
    boxes = 1 if one_box else len(images)
    side = (1 - _beta(alpha, boxes, generator)).sqrt()
    if one_box and images.device.type == "cpu":
        return _one_box_pasted(images, float(side), generator)
    rows, columns = _span(height, side, generator), _span(width, side, generator)
    inside = (rows[:, :, None] & columns[:, None, :]).expand(len(images), -1, -1)
    partner = _permutation(images, generator)
    mixed = torch.where(inside[:, None], images[partner], images)
    return Mixed(mixed, partner, 1 - inside.float().mean((1, 2)))


def _one_box_pasted(images: torch.Tensor, side: float, generator: torch.Generator) -> Mixed:
    """The same box from the same draws, where numbers can be looked at without waiting for a device: the box alone is
    copied."""
    height, width = images.shape[-2:]
    rows, columns = _interval(height, side, generator), _interval(width, side, generator)
    partner = _permutation(images, generator)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[partner, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mixed(
        mixed, partner, torch.full((len(images),), 1 - area / (height * width or 1), dtype=torch.float32)
    )


def _interval(length: int, side: float, generator: torch.Generator) -> slice:
    """:func:`_span`'s pixels, of one interval."""
    centre, half = float(torch.rand((), generator=generator)) * length, side * length / 2
    first = max(0, math.floor(centre - half + 0.5))
    return slice(first, max(first, min(length, math.ceil(centre + half - 0.5))))


def _beta(alpha: float, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draws from Beta(α, α), as torch.distributions has them, which takes no generator."""
    shape = torch.full((2, count), alpha, device=generator.device)
    # For a small α both may underflow to zero.
    gamma: torch.Tensor = torch._standard_gamma(shape, generator=generator)
    own, other = gamma.clamp_min(torch.finfo(torch.float32).tiny)
    drawn: torch.Tensor = own / (own + other)
    return drawn


def _span(length: int, side: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Which of ``length`` pixels lie in a random interval of relative size ``side``: bool ``[N, length]``."""
    half = (side * length / 2)[:, None]
    centre = torch.rand(len(side), 1, generator=generator, device=side.device) * length
    # A pixel belongs to the box when its middle does, so the area is right on average and needs no rounding.
    middle = torch.arange(length, device=side.device) + 0.5
    return (middle - centre).abs() < half


def _uniform(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(len(images), generator=generator, device=images.device)


def _permutation(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(len(images), generator=generator, device=images.device)


def _check(images: torch.Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(f"images: got shape {list(images.shape)}; must be [B, C, H, W]")
    if not images.is_floating_point():
        raise TypeError(f"images: got {images.dtype}; must be floating point")
