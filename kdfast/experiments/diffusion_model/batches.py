"""Noisy images, their clean ones and how much each weighs: what the diffusion model learns from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kdfast.experiments.diffusion_model.config import DiffusionConfig

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class NoisyBatches:
    """Images with noise added, everything random drawn from (seed, epoch, batch): resumable by construction.

    Args:
        dataset: The images, in memory.
        noising: diffusers' scheduler that adds noise.
        config: Sizes and seed.
        num_classes: Number of the null class.
        batches: How many make an epoch.
    """

    def __init__(
        self, dataset: Any, noising: Any, config: DiffusionConfig, num_classes: int, *, batches: int
    ) -> None:
        self._images = dataset.images[:, : config.channels].float() / 127.5 - 1
        self._labels, self._null = dataset.labels, num_classes
        self._noising, self._config, self._batches, self._epoch = noising, config, batches, 0
        ratio = noising.alphas_cumprod / (1 - noising.alphas_cumprod)
        self._weight = ratio.clamp(max=config.snr_limit)

    def __len__(self) -> int:
        return self._batches

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch at the next iteration."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        size = self._config.batch_size
        for number in range(self._batches):
            words = np.random.SeedSequence([self._config.seed, self._epoch, number]).generate_state(1)
            generator = torch.Generator().manual_seed(int(words[0]))
            rows = torch.randint(len(self._labels), (size,), generator=generator)
            timesteps = torch.randint(self._config.timesteps, (size,), generator=generator)
            dropped = torch.rand(size, generator=generator) < self._config.label_dropout
            clean = self._images[rows]
            noise = torch.randn(clean.shape, generator=generator)
            labels = torch.where(dropped, self._null, self._labels[rows])
            yield (
                self._noising.add_noise(clean, noise, timesteps),
                timesteps,
                labels,
                clean,
                self._weight[timesteps],
            )
