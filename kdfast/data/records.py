"""Images by number: any of a set's images in any order, decoded onto the device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.data.decoder import DecoderConfig
from kdfast.data.labelled import LabelledImages
from kdfast.data.loader import make_decoder, output_size
from kdfast.data.preflight import Fault, check_shards
from kdfast.data.reader import RecordReader
from kdfast.errors import ShardError

Indices = NDArray[np.int64]
_NO_CHANGE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


class ImageRecords(Protocol):
    """Numbered images of any kind.

    Attributes:
        labels: int64 ``[N]``, the labels stored beside them.
        classes: Their names; empty if unknown.
        fingerprint: Of the set, to tell whether results belong to it.
    """

    labels: Indices
    classes: tuple[str, ...]
    fingerprint: str

    def batches(self, indices: Indices, batch_size: int) -> Iterator[tuple[Indices, torch.Tensor]]:
        """Numbers of the images that could be decoded, and the images, float32 ``[B, 3, H, W]`` in [0, 1]."""

    def stored(self, indices: Sequence[int]) -> list[bytes] | torch.Tensor:
        """The images to write elsewhere: their files, or uint8 ``[B, 3, H, W]``."""

    def contents(self) -> str:
        """What tells the images, in their order, from any others."""


class ShardRecords:
    """The images of a set of shards.

    Args:
        directory: Shards, as :class:`~kdfast.data.ShardLoader` takes them.
        image_size: Side of the square that :meth:`batches` scales and crops to; ``None`` leaves images as they are.
        device: Where batches end up.
        loader: ``"dali"`` or ``"torch"``.
        on_error: ``"raise"`` at a faulty record, or ``"skip"`` it.

    Raises:
        ShardError: The set is empty or damaged.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        device: torch.device | str = "cpu",
        loader: Literal["dali", "torch"] = "dali",
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.table = check_shards(directory, on_error=on_error)
        self.labels: Indices = self.table.label
        self.classes: tuple[str, ...] = ()
        self.fingerprint = self.table.fingerprint
        self.faults: list[Fault] = list(self.table.faults)
        self._size = image_size
        self._shape = output_size(self.table, image_size)
        self._device, self._loader, self._skip = torch.device(device), loader, on_error == "skip"
        self._reader = RecordReader(self.table)

    def batches(self, indices: Indices, batch_size: int) -> Iterator[tuple[Indices, torch.Tensor]]:
        """See :class:`ImageRecords`; a record that cannot be decoded is left out, or raises a ShardError."""
        config = DecoderConfig(self._device, batch_size, self._size, self._shape, *_NO_CHANGE, None)
        decoder = make_decoder(self._loader, self._reader, config)
        plan = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        try:
            for records, images, failures in decoder.run(plan):
                found = [self.table.fault(record, reason) for record, reason in failures]
                if found and not self._skip:
                    raise ShardError(f"{found[0]}; on_error='skip' leaves faulty records out")
                self.faults += found
                yield records, images
        finally:
            decoder.close()

    def stored(self, indices: Sequence[int]) -> list[bytes]:
        """The records' image files."""
        return [self._reader.read(int(index)) for index in indices]

    def contents(self) -> str:
        """See :class:`ImageRecords`."""
        return self.fingerprint

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()


class LabelledRecords:
    """The images of a labelled data set, all of one size."""

    def __init__(self, dataset: LabelledImages, device: torch.device | str = "cpu") -> None:
        self._dataset, self._device = dataset, torch.device(device)
        self.labels: Indices = dataset.labels.numpy()
        self.classes = tuple(dataset.classes)
        self.fingerprint = f"{dataset.source}:{len(dataset)}:{dataset.fingerprint()}"

    def batches(self, indices: Indices, batch_size: int) -> Iterator[tuple[Indices, torch.Tensor]]:
        """See :class:`ImageRecords`.

        Raises:
            DataError: An image cannot be read.
        """
        for start in range(0, len(indices), batch_size):
            rows = indices[start : start + batch_size]
            yield rows, self.stored(rows.tolist()).to(self._device, non_blocking=True).float() / 255

    def stored(self, indices: Sequence[int]) -> torch.Tensor:
        """The images' pixels."""
        return torch.stack([self._dataset[index][0] for index in indices])

    def contents(self) -> str:
        """See :class:`ImageRecords`."""
        return self._dataset.contents()

    def close(self) -> None:
        """Nothing is open."""
