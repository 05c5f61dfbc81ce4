"""The augmentations that recipes name, as one function over a batch on its device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kdfast.data.augment import padded_crop, random_flip
from kdfast.data.randaugment import grey, rand_augment
from kdfast.data.regimes import REGIMES, random_erase
from kdfast.data.segmentation import IGNORE
from kdfast.errors import ConfigError


@dataclass(frozen=True)
class Augmentation:
    """Apply the named augmentations in order; images ``[B, C, H, W]`` in [0, 1].

    Attributes:
        names: ``crop``, ``resized_crop``, ``flip``, ``rand_augment``, ``color_jitter``, ``erase``, or one of the
            regimes ``standard``, ``high``, ``extreme``; ``scale_crop`` for images with masks.
        image_size: Side of what ``resized_crop`` returns.
    """

    names: Sequence[str]
    image_size: int

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augment a batch with random numbers from a generator on its device.

        Raises:
            ConfigError: An augmentation is for images with masks only.
        """
        for name in self.names:
            if name == "crop":
                images = padded_crop(images, generator, padding=4)
            elif name == "resized_crop":
                images = resized_crop(images, self.image_size, generator)
            elif name == "flip":
                images = random_flip(images, generator)
            elif name == "rand_augment":
                images = rand_augment(images, generator, n=2, magnitude=9)
            elif name == "color_jitter":
                images = color_jitter(images, generator)
            elif name == "erase":
                images = random_erase(images, generator, p=0.25)
            elif name in REGIMES:
                images = REGIMES[name](images, generator)
            else:
                raise ConfigError(
                    f"augment: got {name!r}, accepted for classification: crop, resized_crop, flip, rand_augment, "
                    "color_jitter, erase, standard, high, extreme"
                )
        return images

    def with_masks(
        self, images: torch.Tensor, masks: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment images and their masks ``[B, H, W]`` alike.

        Raises:
            ConfigError: An augmentation has no form for masks.
        """
        for name in self.names:
            if name == "scale_crop":
                images, masks = scale_crop(images, masks, generator)
            elif name == "flip":
                turned = torch.rand(len(images), generator=generator, device=images.device) < 0.5
                images = torch.where(turned[:, None, None, None], images.flip(-1), images)
                masks = torch.where(turned[:, None, None], masks.flip(-1), masks)
            else:
                raise ConfigError(f"augment: got {name!r}, accepted for segmentation: scale_crop, flip")
        return images, masks


def color_jitter(images: torch.Tensor, generator: torch.Generator, *, strength: float = 0.4) -> torch.Tensor:
    """Brightness, contrast and saturation, in this order, each by a factor of 1 ± ``strength`` an image."""
    draws = 1 + strength * (2 * torch.rand(3, len(images), generator=generator, device=images.device) - 1)
    brightness, contrast, saturation = draws.to(images.dtype)[:, :, None, None, None]
    images = (images * brightness).clamp(0, 1)
    middle = grey(images).mean((1, 2, 3), keepdim=True)
    images = (middle + contrast * (images - middle)).clamp(0, 1)
    plain = grey(images)
    coloured: torch.Tensor = (plain + saturation * (images - plain)).clamp(0, 1)
    return coloured


def scale_crop(
    images: torch.Tensor, masks: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each image by 0.5 to 2 (log-uniformly) and cut a window of the old size at a random place.

    Outside the image lie zeros, and pixels that do not count. Images are sampled bilinearly, masks by nearest pixel.
    """
    draws = torch.rand(3, len(images), generator=generator, device=images.device)
    extent = 2 ** (1 - 2 * draws[0])  # of the window, as a share of the image
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = extent
    # A larger window holds the image, a smaller one lies in it.
    theta[:, 0, 2], theta[:, 1, 2] = ((2 * draws[1:] - 1) * (1 - extent).abs()).unbind()
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    scaled = F.grid_sample(images, grid.to(images.dtype), mode="bilinear", align_corners=False)
    # Shifted by one, so that the zeros of the padding can be told from class 0.
    shifted = F.grid_sample((masks + 1)[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0]
    numbers = shifted.round().long() - 1
    return scaled, torch.where(numbers < 0, IGNORE, numbers)


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
