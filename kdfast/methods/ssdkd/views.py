"""Random views of images: zero-padded crop, flip, normalisation, with their gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class Views:
    """Draws a view of each image of a batch.

    Args:
        mean: Per channel, in units of [0, 1].
        std: Per channel.
        padding: Pixels of zeros that the crop may reach into.
        flip: Mirror every other image.
        rng: On the device.
        device: Where images are.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        padding: int,
        flip: bool,
        rng: torch.Generator,
        device: torch.device,
    ) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(std, dtype=torch.float32, device=device)
        self.padding, self.flip, self.rng = padding, flip, rng

    def __call__(self, images: Tensor) -> Tensor:
        """A random view of images ``[B, C, H, W]``, float in [0, 1] or uint8, normalised."""
        batch, device = len(images), images.device
        offsets = torch.randint(0, 2 * self.padding + 1, (batch, 2), generator=self.rng, device=device)
        flips = torch.rand(batch, generator=self.rng, device=device) < (0.5 if self.flip else 0.0)
        return _view(images, offsets, flips, self.mean, self.std, self.padding)

    def plain(self, images: Tensor) -> Tensor:
        """The images themselves, normalised."""
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


def _view(images: Tensor, offsets: Tensor, flips: Tensor, mean: Tensor, std: Tensor, padding: int) -> Tensor:
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    batch, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    sample = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    cut = padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return (cut - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
