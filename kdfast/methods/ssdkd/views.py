"""Random views of images, the same in inversion and in distillation: padded crop, flip, normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.functional import crop_flip_normalize, draw_crop_flip


class Views:
    """Draws a view of each image of a batch.

    Args:
        mean: Per channel, in units of [0, 1].
        std: Per channel.
        padding: Pixels of zeros that the crop may reach into.
        flip: Mirror half of the images.
        rng: On the images' device.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        padding: int,
        flip: bool,
        rng: torch.Generator,
    ) -> None:
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.padding, self.flip, self.rng = padding, 0.5 if flip else 0.0, rng

    def __call__(self, images: Tensor) -> Tensor:
        """A random view of images ``[B, C, H, W]``, float in [0, 1] or uint8, normalised."""
        offsets, flips = draw_crop_flip(images, padding=self.padding, flip=self.flip, generator=self.rng)
        return crop_flip_normalize(images, offsets, flips, self.mean, self.std, padding=self.padding)

    def plain(self, images: Tensor) -> Tensor:
        """The images themselves, normalised."""
        still = torch.zeros(len(images), 2, dtype=torch.int32, device=images.device)
        return crop_flip_normalize(images, still, still[:, 0], self.mean, self.std, padding=0)
