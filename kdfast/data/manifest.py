"""What a directory of shards says about itself: ``manifest.json``, written atomically."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kdfast.errors import ShardError

MANIFEST = "manifest.json"
FORMAT = "kdfast-shards"
VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    """One finished shard.

    Attributes:
        file: Name of the tar inside the directory.
        index: Name of its DALI index file.
        samples: Images in it.
        bytes: Size of the tar.
        sha256: Of the tar, in hexadecimal.
        class_counts: Images per label, as ``{"label": count}`` (JSON has no integer keys).
    """

    file: str
    index: str
    samples: int
    bytes: int
    sha256: str
    class_counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    Attributes:
        image_format: ``"jpg"`` or ``"png"``.
        quality: JPEG quality; ``None`` for PNG.
        samples_per_shard: Images in every shard but the last.
        num_classes: Labels are in ``[0, num_classes)``; ``None`` if nobody said.
        shuffle_seed: Seed of the order inside a shard; ``None`` for the written order.
        metadata: Whatever the generator wants to remember: its config, seed, class names.
        complete: Whether the writer was closed in the regular way.
        shards: In order.
    """

    image_format: str
    quality: int | None
    samples_per_shard: int
    num_classes: int | None
    shuffle_seed: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False
    shards: tuple[ShardInfo, ...] = ()

    @property
    def num_samples(self) -> int:
        """Images in all finished shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def class_counts(self) -> dict[int, int]:
        """Images per label over all finished shards, sorted by label."""
        total: Counter[int] = Counter()
        for shard in self.shards:
            total.update({int(label): count for label, count in shard.class_counts.items()})
        return dict(sorted(total.items()))

    def settings(self) -> dict[str, Any]:
        """What must agree before a second run may add to this directory."""
        everything = asdict(replace(self, shards=()))
        del everything["shards"], everything["complete"]
        return everything

    def write(self, directory: Path) -> None:
        """Replace ``manifest.json``: a reader sees the old one or the new one, never half of one."""
        document = {"format": FORMAT, "version": VERSION, "num_samples": self.num_samples, **asdict(self)}
        write_atomic(directory / MANIFEST, (json.dumps(document, indent=1) + "\n").encode())


def is_shard_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a manifest, finished or not."""
    return (Path(path) / MANIFEST).exists()


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a directory of shards.

    Raises:
        ShardError: There is none, or it is not one that this version can read.
    """
    path = Path(directory) / MANIFEST
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise ShardError(
            f"{path.parent}: holds no {MANIFEST}, so it is not a finished set of shards"
        ) from None
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: cannot be read: {error}") from error
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise ShardError(f"{path}: is not a manifest of kdfast shards")
    if (version := document.pop("version", None)) != VERSION:
        raise ShardError(f"{path}: has version {version}; this kdfast reads version {VERSION}")
    document.pop("num_samples", None)
    try:
        shards = tuple(ShardInfo(**shard) for shard in document.pop("shards"))
        return Manifest(shards=shards, **document)
    except (KeyError, TypeError) as error:
        raise ShardError(f"{path}: is damaged: {error}") from error


def write_atomic(path: Path, *chunks: bytes | memoryview) -> None:
    """Write a file so that it is on disk whole under its name, or not there under that name at all.

    Raises:
        OSError: The disk is full or failing; the temporary file is removed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
