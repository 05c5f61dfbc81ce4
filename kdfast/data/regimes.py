"""The augmentation regimes of "What Makes a Good Dataset for Knowledge Distillation?" (Table 5), for a batch
at a time.

On its device, in the order RandAugment → elastic → invert → flip → padded crop → erasing. Images are in [0,
1] before and after; normalisation comes last and is the loader's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kdfast.constants import constant
from kdfast.data.augment import padded_crop, random_flip
from kdfast.data.randaugment import rand_augment


@dataclass(frozen=True)
class Regime:
    """A chain of augmentations, callable as ``regime(images, generator)``.

    Attributes:
        operations: RandAugment operations an image; 0 for none.
        magnitude: Of RandAugment, 0 to 30.
        elastic: Probability of an elastic distortion (α 50, σ 5).
        invert: Probability of inverting the image.
        flip: Probability of mirroring it.
        crop: Padding of the random crop as a share of the shorter side; 0 for none. An eighth is 4 pixels of
            32.
        erase: Probability of erasing a box.
    """

    operations: int = 0
    magnitude: int = 0
    elastic: float = 0.0
    invert: float = 0.0
    flip: float = 0.0
    crop: float = 0.0
    erase: float = 0.0

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augment images ``[B, 3, H, W]`` in [0, 1] with random numbers from a generator on their device."""
        if self.operations:
            images = rand_augment(images, generator, n=self.operations, magnitude=self.magnitude)
        if self.elastic:
            images = elastic(images, generator, p=self.elastic)
        if self.invert:
            images = random_invert(images, generator, p=self.invert)
        if self.flip:
            images = random_flip(images, generator, p=self.flip)
        if self.crop:
            padding = max(1, round(self.crop * min(images.shape[-2:])))
            images = padded_crop(images, generator, padding=padding)
        if self.erase:
            images = random_erase(images, generator, p=self.erase)
        return images


REGIMES = {
    "none": Regime(),
    "standard": Regime(operations=2, magnitude=14, flip=0.5, crop=1 / 8),
    "high": Regime(operations=4, magnitude=14, elastic=0.5, invert=0.1, flip=0.5, crop=1 / 8),
    "extreme": Regime(operations=8, magnitude=30, elastic=0.5, invert=0.1, flip=0.5, crop=1 / 8, erase=0.5),
}


def regime(name: str) -> Regime:
    """The regime of this name.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in REGIMES:
        raise ValueError(f"augment: got {name!r}; accepted: {', '.join(map(repr, REGIMES))}")
    return REGIMES[name]


def elastic(
    images: torch.Tensor,
    generator: torch.Generator,
    *,
    p: float = 0.5,
    alpha: float = 50.0,
    sigma: float = 5.0,
) -> torch.Tensor:
    """Move each pixel by smooth noise: uniform noise blurred by ``sigma``, times ``alpha`` half pixels.

    The scale is torchvision's (Simard et al. 2003 before it): displacements are α/H of the range [−1, 1].
    Bilinear, black outside.
    """
    batch, _, height, width = images.shape
    chosen = _chance(images, generator, p)
    noise = torch.rand(batch, 2, height, width, generator=generator, device=images.device) * 2 - 1
    shift = _blur(noise, sigma) * alpha
    scale = constant((1 / width, 1 / height), images.device)
    identity = torch.eye(2, 3, device=images.device).expand(batch, -1, -1)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)
    grid = grid + shift.permute(0, 2, 3, 1) * scale
    moved = F.grid_sample(images.float(), grid, mode="bilinear", align_corners=False).to(images.dtype)
    return torch.where(chosen, moved, images)


def random_invert(images: torch.Tensor, generator: torch.Generator, *, p: float = 0.1) -> torch.Tensor:
    """Replace x by 1 − x with probability ``p``."""
    return torch.where(_chance(images, generator, p), 1 - images, images)


def random_erase(images: torch.Tensor, generator: torch.Generator, *, p: float = 0.5) -> torch.Tensor:
    """Blacken a box of 2 to 33 % of the area, 1:3.3 to 3.3:1, with probability ``p`` (Zhong et al. 2020).

    A box that would not fit is shortened to the image.
    """
    batch, _, height, width = images.shape
    chosen = _chance(images, generator, p)
    area, shape, top, left = torch.rand(4, batch, generator=generator, device=images.device)
    pixels = (0.02 + 0.31 * area) * height * width
    ratio = torch.exp((2 * shape - 1) * math.log(3.3))
    tall, wide = (pixels * ratio).sqrt().clamp(max=height), (pixels / ratio).sqrt().clamp(max=width)
    inside = (
        _between(height, top * (height - tall), tall)[:, :, None]
        & _between(width, left * (width - wide), wide)[:, None, :]
    )
    return images.masked_fill(chosen & inside[:, None], 0)


def _between(length: int, start: torch.Tensor, extent: torch.Tensor) -> torch.Tensor:
    middle = torch.arange(length, device=start.device) + 0.5
    return (middle >= start[:, None]) & (middle < (start + extent)[:, None])


def _chance(images: torch.Tensor, generator: torch.Generator, p: float) -> torch.Tensor:
    """Which images are chosen: bool ``[B, 1, 1, 1]``."""
    if not 0 <= p <= 1:
        raise ValueError(f"p: got {p}; must be in [0, 1]")
    if images.ndim != 4:
        raise ValueError(f"images: got shape {list(images.shape)}; must be [B, C, H, W]")
    if not images.is_floating_point():
        raise TypeError(f"images: got {images.dtype}; must be floating point")
    return (torch.rand(len(images), generator=generator, device=images.device) < p)[:, None, None, None]


def _blur(fields: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur, separable, mirrored at the edges: ``[B, C, H, W]``."""
    height, width = fields.shape[-2:]
    # Mirroring reaches as far as the image does.
    radius = min(round(4 * sigma), height - 1, width - 1)
    taps = torch.arange(-radius, radius + 1, device=fields.device, dtype=fields.dtype)
    kernel = torch.softmax(-(taps**2) / (2 * sigma**2), 0).expand(fields.shape[1], 1, 1, -1)
    padded = F.pad(fields, (radius,) * 4, mode="reflect") if radius else fields
    across = F.conv2d(padded, kernel, groups=fields.shape[1])
    return F.conv2d(across, kernel.transpose(2, 3), groups=fields.shape[1])
