"""Writing labelled images as shards that survive whatever stops the writer."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import json
import os
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.closing import Closing
from kdfast.data.claim import OURS, changed, checked, claim
from kdfast.data.codec import FORMATS, ImageFormat, encoder
from kdfast.data.manifest import JOURNAL, MANIFEST, Manifest, ShardInfo
from kdfast.data.tar import Record, pack
from kdfast.data.untar import members
from kdfast.disk import Lock, write_atomic
from kdfast.errors import ShardError

#: Shards up to which the manifest is simply written anew for each.
_SMALL = 64
# Encoding a small image takes microseconds; handing over a task takes about as long.
_CHUNK = 32


class ShardWriteError(ShardError, OSError):
    """The disk is full or failing; nothing partial was left under a shard's final name."""


class ShardWriter(Closing):
    """Write labelled images as WebDataset shards with DALI indices and a manifest.

    A shard appears whole or not at all: it is written under a temporary name, synced, renamed, and only then
    entered into the manifest. With ``resume=True`` a stopped run goes on after :attr:`num_samples`, and the
    finished set is byte for byte what an undisturbed run writes. Leaving the ``with`` block through an
    exception drops the shard in progress.

    Example:
        >>> with ShardWriter("out", num_classes=10, resume=True) as writer:
        ...     for start in range(writer.num_samples, 2000, 100):
        ...         writer.write(*generate(start, start + 100))

    Args:
        directory: Created if missing.
        samples_per_shard: Images a shard; the last may hold fewer.
        image_format: ``"jpg"`` (baseline, 4:4:4), ``"png"`` (lossless) or ``"webp"`` (4:2:0; lossless at quality 100).
        quality: Of JPEG and WebP, 1 to 100.
        num_classes: Labels must be in ``[0, num_classes)``; ``None`` accepts any non-negative int32.
        resume: Continue the set in ``directory``; an empty directory starts a new one.
        metadata: JSON-able facts kept in the manifest (generator config, seed, class names). A set can only
            be resumed with equal metadata.
        shuffle_seed: Permute the samples inside each shard; ``None`` keeps the written order.
        num_workers: Encoder threads; ``None`` for as many as there are CPUs, at most 8.
        first_sample: Where this set begins inside a larger one, a multiple of ``samples_per_shard``: shards and keys
            are numbered from there, so that sets written side by side can be joined.

    Raises:
        ShardError: ``directory`` cannot be written, holds another set, or is not being resumed or left to us.
        MissingExtraError: The codec is not installed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        samples_per_shard: int = 1000,
        image_format: ImageFormat = "jpg",
        quality: int = 95,
        num_classes: int | None = None,
        resume: bool = False,
        metadata: Mapping[str, Any] | None = None,
        shuffle_seed: int | None = None,
        num_workers: int | None = None,
        first_sample: int = 0,
    ) -> None:
        if image_format not in FORMATS:
            raise ValueError(f"image_format: got {image_format!r}; accepted: {str(FORMATS)[1:-1]}")
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard: got {samples_per_shard}; must be at least 1")
        if not 1 <= quality <= 100:
            raise ValueError(f"quality: got {quality}; must be in 1 to 100")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}; must be at least 1, or None")
        if first_sample < 0 or first_sample % samples_per_shard:
            raise ValueError(
                f"first_sample: got {first_sample}; must be a multiple of samples_per_shard={samples_per_shard}"
            )
        self._first = first_sample
        try:
            kept: dict[str, Any] = json.loads(json.dumps(dict(metadata or {})))
        except (TypeError, ValueError) as error:
            raise TypeError(f"metadata: must be JSON-able: {error}") from error
        self.directory = Path(directory)
        self._encode = encoder(image_format, quality)
        settings = Manifest(
            image_format=image_format,
            quality=quality if image_format != "png" else None,
            samples_per_shard=samples_per_shard,
            num_classes=num_classes,
            shuffle_seed=shuffle_seed,
            metadata=kept,
        )
        with _reported(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(
                self.directory / ".lock",
                what=str(self.directory),
                error=ShardError,
                who="another ShardWriter",
            )
        try:
            self._manifest = claim(self.directory, settings, resume)
            self._pending: list[Record | Future[list[Record]]] = []
            self._running: deque[Future[list[Record]]] = deque()
            self._accepted = self._manifest.num_samples
            self._short: ShardInfo | None = None
            self._journalled = 0
            self._reopen_short_shard()
            self._sweep()
        except BaseException:
            self._lock.release()
            raise
        _open_writers.add(self)
        self._pool = ThreadPoolExecutor(num_workers or min(os.cpu_count() or 1, 8), "kdfast-encode")
        self._state: Literal["open", "failed", "closed"] = "open"

    @property
    def num_samples(self) -> int:
        """Images in the set so far: those found on resuming and those accepted since."""
        return self._accepted

    @property
    def manifest(self) -> Manifest:
        """What is durably on disk."""
        if self._short is None:
            return self._manifest
        return replace(self._manifest, shards=(*self._manifest.shards, self._short))

    def write(
        self,
        images: torch.Tensor | NDArray[np.uint8] | Sequence[bytes],
        labels: torch.Tensor | NDArray[np.integer[Any]] | Sequence[int],
        extra: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Append images; they are encoded in the background, and a full shard is written before this returns.

        Args:
            images: uint8 ``[N, 3, H, W]``, any device; or files in the set's format, as bytes, which are kept as they
                are.
            labels: Integers ``[N]``.
            extra: One JSON-able mapping an image, stored beside it as ``.json``.

        Raises:
            TypeError: ``images`` is not uint8, or ``labels`` are not integers.
            ValueError: A shape or a label is out of range, a file is damaged or of another format, or the writer is
                closed.
            ShardWriteError: The disk is full or failing.
        """
        if self._state != "open":
            raise ValueError(f"ShardWriter on {self.directory} is {self._state}; it takes no more images")
        pixels, numbers = checked(images, labels, self._manifest)
        if extra is not None and len(extra) != len(pixels):
            raise ValueError(f"extra: got {len(extra)} entries for {len(pixels)} images")
        extras = [json.dumps(dict(entry), sort_keys=True).encode() for entry in extra] if extra else None
        done = 0
        try:
            while done < len(pixels):
                room = self._manifest.num_samples + self._manifest.samples_per_shard - self._accepted
                part = slice(done, min(done + min(room, _CHUNK), len(pixels)))
                task = self._pool.submit(
                    self._records,
                    self._accepted,
                    pixels[part],
                    numbers[part],
                    extras[part] if extras else None,
                )
                self._pending.append(task)
                self._running.append(task)
                self._accepted += part.stop - done
                if part.stop - done == room:
                    self._publish()
                done = part.stop
            # An encoder's failure should not wait for the shard to fill.
            while self._running and self._running[0].done():
                self._running.popleft().result()
        except BaseException:
            self._state = "failed"
            raise

    def close(self) -> None:
        """Write what is left as a short shard, and mark the set complete."""
        if self._state == "closed":
            return
        try:
            if self._state == "open":
                if self._short is not None and self._accepted == self.manifest.num_samples:
                    self._manifest, self._short = self.manifest, None
                elif self._pending:
                    self._publish()
                self._manifest = replace(self._manifest, complete=True)
                self._write_manifest()
        finally:
            self._release()

    def abandon(self) -> None:
        """End without what is left, and without marking the set complete: what an error in a ``with`` block does."""
        self._release()

    def _release(self, *, wait: bool = True) -> None:
        self._pool.shutdown(wait, cancel_futures=True)
        self._pending.clear()
        self._lock.release()
        self._state = "closed"
        with contextlib.suppress(TypeError):  # while it is being collected no reference to it can be made
            _open_writers.discard(self)

    def _keep(self) -> None:
        """Nobody closed this writer and nobody can any more: keep its images, and say so."""
        if getattr(self, "_state", "closed") != "open":
            return
        waiting = self._accepted - self.manifest.num_samples
        try:
            if waiting:
                self._publish()
        finally:
            self._release(wait=False)  # it may be an encoder that dropped the last reference
        warnings.warn(
            f"ShardWriter on {self.directory} was never closed; its last {waiting} images are written now, but the set "
            "is not marked complete: leave its `with` block, or call close()",
            RuntimeWarning,
            stacklevel=2,
        )

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._keep()

    def _records(
        self,
        first: int,
        pixels: NDArray[np.uint8] | Sequence[bytes],
        labels: NDArray[np.int32],
        extras: list[bytes] | None,
    ) -> list[Record]:
        if isinstance(pixels, np.ndarray):
            upright = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
            pixels = [self._encode(image) for image in upright]
        return [
            Record(f"{self._first + first + i:09d}", file, labels[i].tobytes(), extras[i] if extras else None)
            for i, file in enumerate(pixels)
        ]

    def _publish(self) -> None:
        """Make everything pending one shard."""
        records: list[Record] = []
        for waiting in self._pending:
            records.extend(waiting.result() if isinstance(waiting, Future) else [waiting])
        number = self._first // self._manifest.samples_per_shard + len(self._manifest.shards)
        if self._manifest.shuffle_seed is not None:
            order = np.random.default_rng([self._manifest.shuffle_seed, number]).permutation(len(records))
            records = [records[i] for i in order]
        tar, index = pack(records, self._manifest.image_format)
        name = f"shard-{number:06d}"
        counts = Counter(int.from_bytes(record.label, "little") for record in records)
        info = ShardInfo(
            file=f"{name}.tar",
            index=f"{name}.idx",
            samples=len(records),
            bytes=len(tar),
            sha256=hashlib.sha256(tar).hexdigest(),
            class_counts={str(label): counts[label] for label in sorted(counts)},
        )
        if self._short is not None:
            # Out of the manifest before its file is replaced: a crash between costs this shard, not the set.
            self._short = None
            self._write_manifest()
        with _reported(self.directory / info.file):
            write_atomic(self.directory / info.index, index, alone=True)
            write_atomic(self.directory / info.file, tar, alone=True)
        self._manifest = replace(self._manifest, shards=(*self._manifest.shards, info))
        # Rewriting it for every shard would cost the square of their number.
        if len(self._manifest.shards) <= max(_SMALL, 2 * self._journalled):
            self._write_manifest()
        else:
            with _reported(self.directory / JOURNAL):
                self._manifest.add_last(self.directory)
            self._journalled += 1
        self._pending.clear()
        self._running.clear()

    def _write_manifest(self) -> None:
        with _reported(self.directory / MANIFEST):
            self.manifest.write(self.directory)
        self._journalled = 0

    def _reopen_short_shard(self) -> None:
        """Take a short last shard back into memory, so that the set grows as if it had never been closed."""
        shards = self._manifest.shards
        if not shards or shards[-1].samples == self._manifest.samples_per_shard:
            return
        # Read once, so that what is checked is what is kept.
        path = self.directory / shards[-1].file
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != shards[-1].sha256:
            raise changed(path)
        records: dict[str, dict[str, bytes]] = {}
        for member in members(io.BytesIO(data)):
            content = data[member.offset : member.offset + member.size]
            records.setdefault(member.key, {})[member.extension] = content
        # Sorted: the written order, which a shuffled shard does not keep.
        for key in sorted(records):
            parts = records[key]
            if not {self._manifest.image_format, "i32"} <= parts.keys():
                raise ShardError(f"{path}: key {key!r} has no .{self._manifest.image_format} or no .i32")
            image = parts[self._manifest.image_format]
            self._pending.append(Record(key, image, parts["i32"], parts.get("json")))
        self._manifest, self._short = replace(self._manifest, shards=shards[:-1]), shards[-1]

    def _sweep(self) -> None:
        """Enter the directory's state on disk and remove what a stopped run left behind."""
        self._manifest = replace(self._manifest, complete=False)
        self._write_manifest()
        keep = {MANIFEST, *(n for shard in self.manifest.shards for n in (shard.file, shard.index))}
        for path in self.directory.iterdir():
            if path.name not in keep and OURS.fullmatch(path.name):
                path.unlink()


#: Not garbage collected before the interpreter's end: atexit sees to them.
_open_writers: weakref.WeakSet[ShardWriter] = weakref.WeakSet()


@atexit.register
def _keep_all() -> None:
    for writer in list(_open_writers):
        writer._keep()


@contextlib.contextmanager
def _reported(path: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise ShardWriteError(error.errno, f"cannot write the shard: {error.strerror}", str(path)) from error
