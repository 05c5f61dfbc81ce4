"""The plain loader, simplejpeg and Pillow in a torch DataLoader: asked for by name, never implied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from kdfast.constants import constant
from kdfast.data.codec import Image, decode
from kdfast.data.decoder import Decoded, DecoderConfig
from kdfast.data.reader import RecordLost, RecordReader
from kdfast.errors import KDFastError, require

_Batch = TypeVar("_Batch")


class TorchDecoder:
    """Decodes batches in this process, or in ``num_workers`` processes that outlive the epoch."""

    def __init__(self, reader: RecordReader, config: DecoderConfig) -> None:
        require("simplejpeg", extra="dali", feature='ShardLoader(loader="torch")')
        self._plan = _Plan()
        workers = config.num_workers or 0
        self._device, self._channels = config.device, (config.mean, config.std)
        self._batches: DataLoader[tuple[torch.Tensor, list[tuple[int, str]]]] = DataLoader(
            _Batches(reader, config),
            sampler=self._plan,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=config.device.type == "cuda",
        )

    def run(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Decoded]:
        """Decode batches in order."""
        self._plan.batches = batches
        mean, std = (constant(tuple(values), self._device).view(3, 1, 1) for values in self._channels)
        for batch, (pixels, failures) in zip(batches, surviving(self._batches)):
            bad = [record for record, _ in failures]
            images = pixels.to(self._device, non_blocking=True).to(torch.float32).div_(255)
            yield Decoded(batch[~np.isin(batch, bad)], images.sub_(mean).div_(std), failures)

    def close(self) -> None:
        """End the worker processes."""
        end_workers(self._batches)


def surviving(batches: DataLoader[_Batch]) -> Iterator[_Batch]:
    """The batches of a loader, whose worker processes may die: an error that says so, and the next epoch has new ones.

    Raises:
        KDFastError: A worker process died.
    """
    iterator: Iterator[_Batch] | None = None
    while True:
        try:
            iterator = iter(batches) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError) as error:
            words = str(error).partition("\n")[0]
            if not batches.num_workers or ("worker" not in words and not isinstance(error, OSError)):
                raise
            end_workers(batches)
            # Torch's own words say which, and how it ended.
            raise KDFastError(
                f"num_workers: a decoding process died or cannot be had ({words}); where memory, /dev/shm or open "
                "files (ulimit -n) ran out, take fewer workers or smaller batches"
            ) from error
        yield batch


def end_workers(batches: DataLoader[Any]) -> None:
    """End a loader's persistent worker processes, and their queues with them."""
    workers = getattr(batches, "_iterator", None)
    if workers is not None:
        workers._shutdown_workers()
        batches._iterator = None


class _Plan(Sampler[NDArray[np.int64]]):
    """A sampler whose batches change from epoch to epoch, so that workers need not be started anew."""

    def __init__(self) -> None:
        self.batches: Sequence[NDArray[np.int64]] = ()

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Batches(Dataset[tuple[torch.Tensor, list[tuple[int, str]]]]):
    def __init__(self, reader: RecordReader, config: DecoderConfig) -> None:
        self._reader, self._image_size, self._empty = reader, config.image_size, config.output_size

    def __getitem__(self, batch: NDArray[np.int64]) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        images: list[Image] = []
        failures: list[tuple[int, str]] = []
        for record in batch.tolist():
            try:
                # Strictly, as DALI does: what one loader takes the other takes.
                image = decode(self._reader.read(record), strict=True)
            except RecordLost as lost:
                failures.append((record, lost.reason))
            except ValueError as error:
                failures.append((record, str(error)))
            else:
                images.append(image if self._image_size is None else _fit(image, self._image_size))
        if not images:
            return torch.empty(0, 3, *self._empty, dtype=torch.uint8), failures
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), failures


def _fit(image: Image, size: int) -> Image:
    """Scale the shorter side to ``size`` with an antialiased triangular filter, and cut out the middle."""
    from PIL import Image as pil

    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    resized = pil.fromarray(image).resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), pil.Resampling.BILINEAR
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))
