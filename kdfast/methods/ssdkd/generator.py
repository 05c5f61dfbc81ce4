"""What images are made of: Fast-Datafree's generator, or pixels themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Generator", "Pixels"]


class Generator(nn.Module):
    """Latents ``[B, latent]`` to images ``[B, C, H, W]`` in [0, 1] (Fang et al. 2022).

    Linear to ``2·width`` maps of the image's size over 2^upsamplings, batch norm, then for each doubling a nearest
    upsampling, a 3×3 convolution, batch norm and leaky ReLU, and a last 3×3 convolution with a sigmoid. It only ever
    sees its own batches: batch norm keeps no running statistics.

    Args:
        latent: Length of z.
        image_shape: (C, H, W).
        width: Channels before the last convolution.
        upsamplings: How many doublings.
        rng: Where the weights come from, a generator on ``device``.
        device: Where it lives.
    """

    def __init__(
        self,
        latent: int,
        image_shape: Sequence[int],
        *,
        width: int = 64,
        upsamplings: int = 2,
        rng: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        channels, *size = image_shape
        # Sizes that 2^upsamplings does not divide are rounded up on the way, and met exactly at the end.
        self.sizes = [
            tuple(math.ceil(side / 2**level) for side in size) for level in range(upsamplings, -1, -1)
        ]
        self.width = 2 * width
        self.linear = nn.Linear(latent, self.width * math.prod(self.sizes[0]))
        self.norm = _norm(self.width)
        widths = [self.width] * upsamplings + [width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(_norm(after) for after in widths[1:])
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.to(device)
        self.initialise(rng)

    def forward(self, z: Tensor) -> Tensor:
        """Images of latents."""
        x = self.norm(self.linear(z).unflatten(1, (self.width, *self.sizes[0])))
        for convolution, norm, size in zip(self.convolutions, self.norms, self.sizes[1:]):
            x = F.interpolate(x, size=size, mode="nearest")
            x = F.leaky_relu(norm(convolution(x)), 0.2)
        return torch.sigmoid(self.last(x))

    @torch.no_grad()
    def initialise(self, rng: torch.Generator | None = None) -> None:
        """Draw all weights again, as torch's own layers do."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=rng)
                bound = 1 / math.sqrt(module.weight[0].numel())
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound, generator=rng)

    @torch.no_grad()
    def reset_first_layer(self, rng: torch.Generator | None = None) -> None:
        """Draw the linear layer's weights from N(0, 0.02²) again, biases 0: a way out of a collapsed generator."""
        nn.init.normal_(self.linear.weight, 0.0, 0.02, generator=rng)
        nn.init.zeros_(self.linear.bias)


class Pixels(nn.Module):
    """No generator: the latents are the images, before a sigmoid keeps them in [0, 1]."""

    def forward(self, z: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` of latents of that shape."""
        return torch.sigmoid(z)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)
