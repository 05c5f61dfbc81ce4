"""The fast loader: NVIDIA DALI, fed record by record.

DALI's own ``readers.webdataset`` could read these shards, and its index files are written for whoever wants
that. Here the bytes go in through ``external_source`` instead, since the reader cannot do what a distillation
run needs: name the next sample between two batches and start there again, leave out single bad records, tell
which record broke the decoder, and shuffle by more than a window. Decoding, scaling, cropping and normalising
are DALI's.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.data.codec import decode, encoder
from kdfast.data.decoder import Decoded, DecoderConfig
from kdfast.data.headers import is_grey_jpeg, is_turned_webp
from kdfast.data.reader import RecordLost, RecordReader
from kdfast.errors import ShardError, require

# One batch with the consumer, one done, one under way.
_AHEAD = 2


class DaliDecoder:
    """Keeps one pipeline for all epochs; builds another (milliseconds) only after a record has broken it."""

    def __init__(self, reader: RecordReader, config: DecoderConfig) -> None:
        require("nvidia.dali", extra="dali", feature='ShardLoader(loader="dali")')
        self._reader, self._config = reader, config
        self._pipeline: Any = None

    def run(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Decoded]:
        """Decode batches in order, up to two ahead of the consumer."""
        waiting = deque(_Batch(records) for records in batches)
        ahead: deque[_Batch] = deque()
        try:
            while waiting or ahead:
                try:
                    while waiting and len(ahead) < _AHEAD:
                        ahead.append(waiting.popleft())
                        self._feed(ahead[-1])
                    images = self._collect(ahead[0])
                except RuntimeError as error:
                    # The pipeline is gone with all that was under way, so that is fed again, without the
                    # culprits.
                    self.close()
                    if not sum([batch.drop_undecodable() for batch in ahead]) and not sum(
                        [batch.reencode() for batch in ahead]
                    ):
                        raise ShardError(
                            f"DALI ended without a record that it could not decode: {error}"
                        ) from error
                    waiting.extendleft(reversed(ahead))
                    ahead.clear()
                else:
                    batch = ahead.popleft()
                    yield Decoded(batch.records, images, batch.failures)
        finally:
            self._drain(ahead)

    def close(self) -> None:
        """Free the pipeline."""
        self._pipeline = None

    def _feed(self, batch: _Batch) -> None:
        batch.read(self._reader)
        if batch.encoded:
            if self._pipeline is None:
                self._pipeline = _build(self._config)
            # Not copied: the batch keeps its bytes alive until its images are there.
            self._pipeline.feed_input("encoded", batch.encoded)
            self._pipeline.schedule_run()

    def _collect(self, batch: _Batch) -> torch.Tensor:
        device = self._config.device
        if not batch.encoded:
            return torch.empty(0, 3, *self._config.output_size, device=device)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        (images,) = self._pipeline.share_outputs(cuda_stream=stream)
        # The tensor keeps DALI's buffer alive: dynamic execution hands it over for good.
        handed = torch.utils.dlpack.from_dlpack(images.as_tensor())
        self._pipeline.release_outputs()
        return handed

    def _drain(self, ahead: Iterable[_Batch]) -> None:
        """Take out what an abandoned epoch has under way, so that the next one finds the pipeline empty."""
        if sys.is_finalizing():
            return  # DALI has put its pipelines away before
        try:
            for batch in ahead:
                if self._pipeline is not None:
                    self._collect(batch)
        except RuntimeError:
            self.close()


@dataclass
class _Batch:
    """Records on their way through the pipeline."""

    records: NDArray[np.int64]
    encoded: list[NDArray[np.uint8]] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)

    clean: dict[int, bytes] = field(default_factory=dict)

    def read(self, reader: RecordReader) -> None:
        """Take the files' bytes from the shards; a record whose shard has shrunk is one that failed."""
        self.encoded, lost = [], []
        for record in self.records.tolist():
            try:
                data = self.clean.get(record) or _readable(reader.read(record))
            except ShardError as error:
                lost.append((record, error.reason if isinstance(error, RecordLost) else str(error)))
            except ValueError as error:
                lost.append((record, str(error)))
            else:
                self.encoded.append(np.frombuffer(data, np.uint8))
        self.records = self.records[~np.isin(self.records, [record for record, _ in lost])]
        self.failures += lost

    def reencode(self) -> int:
        """Where DALI ends over files that are sound by our own decoder: give it the same pixels as plain PNGs.

        Returns:
            How many it had not been given so before.
        """
        fresh = {
            record: _plain(data.tobytes())
            for record, data in zip(self.records.tolist(), self.encoded)
            if record not in self.clean
        }
        self.clean |= fresh
        return len(fresh)

    def drop_undecodable(self) -> int:
        """Leave out the records that do not decode one by one; returns how many."""
        found = []
        for record, data in zip(self.records.tolist(), self.encoded):
            try:
                # Strictly: DALI refuses missing data that libjpeg paints over.
                decode(data.tobytes(), strict=True)
            except ValueError as reason:
                found.append((record, str(reason)))
        self.records = self.records[~np.isin(self.records, [record for record, _ in found])]
        self.failures += found
        return len(found)


def _plain(data: bytes) -> bytes:
    """The same pixels, upright, as a PNG that every decoder reads.

    Raises:
        ValueError: They cannot be decoded.
    """
    return encoder("png", 100)(decode(data, strict=True))


def _readable(data: bytes) -> bytes:
    """A file as DALI is given it.

    Raises:
        ValueError: It is damaged in a way that DALI does not see.
    """
    if is_grey_jpeg(data):
        # DALI takes some damage of these that it refuses in others.
        decode(data, strict=True)
    return _plain(data) if is_turned_webp(data) else data  # over which DALI ends


def _build(config: DecoderConfig) -> Any:
    from nvidia.dali import Pipeline, fn, types

    cuda = config.device.type == "cuda"
    pipeline = Pipeline(
        batch_size=config.batch_size,
        num_threads=config.num_workers or _threads(),
        device_id=(config.device.index or 0) if cuda else None,
        # Depth 1: batches are scheduled by hand, and more of them than one may be under way all the same.
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", no_copy=True)
        images = fn.decoders.image(
            encoded, device="mixed" if cuda else "cpu", output_type=types.RGB, jpeg_fancy_upsampling=True
        )
        crop: Any = None
        if config.image_size is not None:
            images = fn.resize(
                images,
                size=config.image_size,
                mode="not_smaller",
                antialias=True,
                interp_type=types.INTERP_TRIANGULAR,
            )
            crop = (config.image_size, config.image_size)
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in config.mean],
            std=[255 * value for value in config.std],
            crop=crop,
            rounding="truncate",
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _threads() -> int:
    # More than a few oversubscribe a host that feeds several GPUs.
    return min(8, len(os.sched_getaffinity(0)))
