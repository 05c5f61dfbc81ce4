"""What the two loaders have in common: batches of record numbers in, images out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class DecoderConfig:
    """How images come out.

    Attributes:
        device: Where the batches end up.
        batch_size: The largest batch.
        image_size: Side of the square that images are scaled and cropped to; ``None`` leaves them as they
            are.
        output_size: Height and width of what comes out.
        mean, std: Per channel, in units of [0, 1]; zero and one leave the images in [0, 1].
        num_workers: Decode threads (DALI) or processes (torch); ``None`` for the loader's default.
    """

    device: torch.device
    batch_size: int
    image_size: int | None
    output_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_workers: int | None


class Decoded(NamedTuple):
    """A batch: records that decoded, their images float32 ``[B, 3, H, W]``, ``(record, why)`` of the rest."""

    records: NDArray[np.int64]
    images: torch.Tensor
    failures: list[tuple[int, str]]


class Decoder(Protocol):
    """Decodes batches ahead of their consumer, in order."""

    def run(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Decoded]:
        """Give one :class:`Decoded` a batch, in order; closing the iterator drops what was under way."""

    def close(self) -> None:
        """Hand back threads and memory."""
