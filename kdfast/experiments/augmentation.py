"""The augmentations that recipes name, as one function over a batch on its device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kdfast.data.augment import padded_crop, random_flip


@dataclass(frozen=True)
class Augmentation:
    """Apply the named augmentations in order; images ``[B, C, H, W]`` in [0, 1].

    Attributes:
        names: ``crop``, ``resized_crop``, ``flip``.
        image_size: Side of what ``resized_crop`` returns.
    """

    names: Sequence[str]
    image_size: int

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augment a batch with random numbers from a generator on its device."""
        for name in self.names:
            if name == "crop":
                images = padded_crop(images, generator, padding=4)
            elif name == "resized_crop":
                images = resized_crop(images, self.image_size, generator)
            elif name == "flip":
                images = random_flip(images, generator)
        return images


def resized_crop(images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Cut 8 to 100 % of each image's area at a ratio of 3:4 to 4:3, and resize it to a square (Szegedy et al. 2015).

    Bilinear, one sampling for the batch. A cut that would not fit is shortened to the image.
    """
    batch, device = len(images), images.device
    draws = torch.rand(4, batch, generator=generator, device=device)
    area = 0.08 + 0.92 * draws[0]
    ratio = torch.exp((2 * draws[1] - 1) * math.log(4 / 3))
    # Extents as shares of the image's own, which affine_grid counts in.
    height, width = images.shape[-2:]
    ratio = ratio * height / width
    across, down = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(batch, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = across, down
    theta[:, 0, 2], theta[:, 1, 2] = (2 * draws[2] - 1) * (1 - across), (2 * draws[3] - 1) * (1 - down)
    grid = F.affine_grid(theta, [batch, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(
        images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )
