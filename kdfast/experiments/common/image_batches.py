"""Batches of a labelled data set, in an order that seed and epoch decide alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdfast.data.datasets import InMemoryImages, LabelledImages
from kdfast.data.segmentation import SegmentationFolder
from kdfast.documents import Fields
from kdfast.errors import CheckpointError
from kdfast.experiments.common.augmentation import Augmentation
from kdfast.experiments.common.decoding import decoded


class ImageBatches:
    """Pairs of normalised images float32 ``[B, C, H, W]`` and labels int64 ``[B]``, or masks ``[B, H, W]``.

    A set in memory is indexed as a tensor and augmented where it lies; any other is decoded in worker processes, and
    kept in memory where it is small (see :mod:`~kdfast.experiments.common.decoding`).

    Args:
        dataset: The images.
        batch_size: Images a batch.
        mean: Per channel, in units of [0, 1].
        std: Per channel.
        augment: On images in [0, 1], before normalisation.
        shuffle: A new order each epoch; without it all images come once and in order, the last batch may be short.
            With it all batches are full and the epoch's first images come again at its end.
        seed: Of order and augmentation.
        rank: This process.
        world_size: Of so many.
        workers: Decoding processes, for sets that are not in memory: 0 decodes in this one, None chooses.
        device: Where a set in memory is put.
        records: Give the images' numbers in the data set, int64 ``[B]``, in the labels' place.
    """

    def __init__(
        self,
        dataset: LabelledImages | SegmentationFolder,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augmentation | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        device: torch.device | str = "cpu",
        records: bool = False,
    ) -> None:
        self._dataset, self._augment, self._shuffle, self._records = dataset, augment, shuffle, records
        self._batch_size, self._seed, self._rank, self._world, self._workers = (
            batch_size,
            seed,
            rank,
            world_size,
            workers,
        )
        self._device = torch.device(device) if isinstance(dataset, InMemoryImages) else torch.device("cpu")
        shape = (1, len(mean), 1, 1)
        self._mean = torch.tensor(mean, dtype=torch.float32, device=self._device).view(shape)
        self._std = torch.tensor(std, dtype=torch.float32, device=self._device).view(shape)
        self._images = dataset.images.to(self._device) if isinstance(dataset, InMemoryImages) else None
        self._epoch, self._batch = 0, 0
        self._fingerprint: str | None = None

    @property
    def dataset(self) -> LabelledImages | SegmentationFolder:
        """The images."""
        return self._dataset

    def __len__(self) -> int:
        """Batches an epoch; while shuffling the same on every rank."""
        count = len(self._dataset)
        mine = math.ceil(count / self._world) if self._shuffle else len(range(self._rank, count, self._world))
        return math.ceil(mine / self._batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the beginning of this epoch."""
        self._epoch, self._batch = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Which batch comes next, and of which images."""
        return {"data": self._data(), "epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there.

        Raises:
            CheckpointError: The images, their labels or classes are not those that the state is of.
        """
        given = Fields(dict(state) if isinstance(state, Mapping) else state, "loader state", CheckpointError)
        if given.text("data") != self._data():
            raise CheckpointError(
                f"loader state: {self._dataset.source} is not what it was: images, labels or class names have changed "
                "since the checkpoint. Put them back, or begin a new run in another directory"
            )
        epoch, batch = given.integer("epoch", 0), given.integer("batch", 0, len(self))
        self._epoch, self._batch = epoch, batch

    def _data(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = self._dataset.fingerprint()
        return self._fingerprint

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = self._order()
        # Unshuffled means measuring: that always starts over, whatever became of the last iteration.
        first = self._batch if self._shuffle else 0
        starts = range(first * self._batch_size, len(order), self._batch_size)
        rows = [order[start : start + self._batch_size] for start in starts]
        for number, (images, labels) in enumerate(self._decoded(rows), first):
            images = images.float() / 255
            if self._augment is not None:
                words = [self._seed, self._epoch, number, self._rank]
                seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
                generator = torch.Generator(images.device).manual_seed(seed)
                if labels.dim() == 3:
                    images, labels = self._augment.with_masks(images, labels, generator)
                else:
                    images = self._augment(images, generator)
            self._batch = number + 1
            yield (images - self._mean) / self._std, rows[number - first] if self._records else labels
        self._epoch, self._batch = self._epoch + 1, 0

    def _order(self) -> torch.Tensor:
        count = len(self._dataset)
        if not self._shuffle:
            return torch.arange(self._rank, count, self._world)
        order = np.random.default_rng([self._seed, self._epoch]).permutation(count)
        filled = np.resize(order, len(self) * self._batch_size * self._world)
        return torch.from_numpy(filled[self._rank :: self._world].copy())

    def _decoded(self, rows: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if isinstance(self._dataset, InMemoryImages) and self._images is not None:
            for row in rows:
                yield self._images[row.to(self._device)], self._dataset.labels[row].to(self._device)
            return
        yield from decoded(self._dataset).batches(rows, self._workers)
