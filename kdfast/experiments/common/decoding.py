"""Images that are decoded when asked for: in worker processes, and once only where the set is small enough to keep."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from kdfast.data.labelled import LabelledImages
from kdfast.data.segmentation import SegmentationFolder
from kdfast.data.torch_loader import surviving
from kdfast.errors import KDFastError

__all__ = ["KEPT_BYTES", "Decoded", "automatic_workers", "decoded"]

#: Sets of at most so many bytes, decoded, stay in memory.
KEPT_BYTES = 1 << 30
#: Fewer images than this are decoded sooner than a process is started.
FEW = 256
MOST_WORKERS = 8
#: Batches that each worker has ready.
AHEAD = 2

Labelled = LabelledImages | SegmentationFolder


def decoded(dataset: Labelled) -> Decoded:
    """One for each data set, so that whoever reads it next finds what the last one has decoded."""
    return _all.setdefault(dataset, Decoded(dataset))


class Decoded:
    """Batches of a data set's images and labels by index; those that fit into :data:`KEPT_BYTES` are decoded once."""

    def __init__(self, dataset: Labelled) -> None:
        self._dataset = weakref.ref(dataset)
        self._have = torch.zeros(len(dataset), dtype=torch.bool)
        self._kept: tuple[Tensor, ...] | None = None
        self._keeping = True

    def batches(self, rows: list[Tensor], workers: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """``(images, labels)`` of each row of indices, in order.

        Args:
            rows: Indices, int64, of each batch.
            workers: Decoding processes; 0 decodes here, None lets :func:`automatic_workers` choose.

        Raises:
            DataError: An image cannot be read; the file is named.
        """
        missing = [not bool(self._have[row].all()) for row in rows]
        fresh = self._read([row for row, wanted in zip(rows, missing, strict=True) if wanted], workers)
        for row, wanted in zip(rows, missing, strict=True):
            if wanted:
                batch = next(fresh)
                self._keep(row, batch)
                yield batch
            else:
                assert self._kept is not None
                images, labels = (part[row] for part in self._kept)
                yield images, labels

    def _keep(self, row: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        if self._keeping and self._kept is None:
            size = sum(part[0].numel() * part.element_size() for part in batch)
            self._keeping = size * len(self._have) <= KEPT_BYTES
            if self._keeping:
                count = len(self._have)
                self._kept = tuple(torch.empty(count, *part.shape[1:], dtype=part.dtype) for part in batch)
        if not self._keeping or self._kept is None:
            return
        if any(kept.shape[1:] != part.shape[1:] for kept, part in zip(self._kept, batch, strict=True)):
            self._keeping, self._kept = False, None  # images of several sizes
            self._have.zero_()
            return
        for kept, part in zip(self._kept, batch, strict=True):
            kept[row] = part
        self._have[row] = True

    def _read(self, rows: list[Tensor], workers: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        dataset: Any = self._dataset()
        if not rows or dataset is None:
            return
        if workers is None:
            first = dataset[int(rows[0][0])][0]
            workers = automatic_workers(
                sum(map(len, rows)), first.numel() * first.element_size() * len(rows[0])
            )
        if not workers:
            for row in rows:
                yield _batch(dataset, row.tolist())
            return
        # A generator of its own: the order in which networks draw does not depend on what had to be decoded.
        loader = DataLoader(
            _Caught(dataset),
            batch_sampler=[row.tolist() for row in rows],
            num_workers=workers,
            prefetch_factor=AHEAD,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
        )
        for batch in surviving(loader):
            if isinstance(batch, KDFastError):
                raise batch
            yield batch


#: The data sets in use, each with what it has decoded; it goes with its data set.
_all: weakref.WeakKeyDictionary[Any, Decoded] = weakref.WeakKeyDictionary()


class _Caught(Dataset[Any]):
    """Whole batches; an error comes back as itself, where a loader would put a worker's traceback into its message."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            return _batch(self._dataset, indices)
        except KDFastError as error:
            return error


def _batch(dataset: Any, indices: list[int]) -> tuple[Tensor, Tensor]:
    images, labels = default_collate([dataset[index] for index in indices])
    return images, labels


def _as_it_is(batch: Any) -> Any:
    return batch


def automatic_workers(images: int, batch_bytes: int) -> int:
    """How many processes decode: one a CPU, at most 8; none where they would not pay, or cannot hand over a batch.

    Args:
        images: That are to be decoded.
        batch_bytes: Of one decoded batch, which travels through shared memory: containers often have 64 MB of it.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if images < FEW or cpus < 2 or multiprocessing.current_process().daemon:
        return 0
    count = min(cpus, MOST_WORKERS)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < (AHEAD * count + 2) * batch_bytes:
        return 0
    return count
