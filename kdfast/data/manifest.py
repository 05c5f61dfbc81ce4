"""What a directory of shards says about itself: ``manifest.json``, written atomically."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kdfast.data.codec import FORMATS
from kdfast.disk import sync_directory, write_atomic
from kdfast.documents import Fields, parse_json, read_json, read_text, shown
from kdfast.errors import ShardError

MANIFEST = "manifest.json"
JOURNAL = "manifest.journal"
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
        image_format: ``"jpg"``, ``"png"`` or ``"webp"``.
        quality: Of JPEG and WebP; ``None`` for PNG.
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
        write_atomic(directory / MANIFEST, (json.dumps(document, indent=1) + "\n").encode(), alone=True)
        (directory / JOURNAL).unlink(missing_ok=True)

    def add_last(self, directory: Path) -> None:
        """Enter the last shard, on disk when this returns, at a cost that does not grow with the set.

        It goes to the end of ``manifest.journal``, a JSON object a line, which :func:`read_manifest` reads after the
        manifest and :meth:`write` makes superfluous.
        """
        entry = {"number": len(self.shards) - 1, "shard": asdict(self.shards[-1])}
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(directory / JOURNAL, flags, 0o644), "ab") as stream:
            # A line before it that a crash cut short stays alone, and is passed over.
            stream.write(b"\n" + json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        sync_directory(directory)


def is_shard_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a manifest, finished or not."""
    return (Path(path) / MANIFEST).exists()


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a directory of shards.

    It may have come with somebody's data, so every value is checked, and a shard's name may only be one that
    :class:`~kdfast.data.ShardWriter` gives: no manifest makes anyone open a file outside of its folder.

    Raises:
        ShardError: There is none, or it is not one that this version can read; the message names the field.
    """
    path = Path(directory) / MANIFEST
    try:
        read = read_json(path, error=ShardError)
    except FileNotFoundError:
        raise ShardError(
            f"{path.parent}: holds no {MANIFEST}, so it is not a finished set of shards"
        ) from None
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        raise ShardError(f"{path}: is not a manifest of kdfast shards")
    if (version := read.get("version")) != VERSION:
        raise ShardError(f"{path}: has version {shown(version)}; this kdfast reads version {VERSION}")
    document = Fields(read, f"{path}: is damaged", ShardError)
    document.only(["format", "version", "num_samples", *(f.name for f in fields(Manifest))])
    classes = document.optional("num_classes", lambda name: document.integer(name, 1, 2**31))
    entries = [*document.entries("shards")]
    entries += _journal(path.with_name(JOURNAL), len(entries))
    shards = tuple(
        _shard(Fields(entry, f"{path}: shard {number}", ShardError)) for number, entry in enumerate(entries)
    )
    for name in ("file", "index"):
        names = Counter(getattr(shard, name) for shard in shards)
        if twice := [known for known, count in names.items() if count > 1]:
            raise ShardError(f"{path}: lists {twice[0]} {names[twice[0]]} times")
    return Manifest(
        image_format=document.choice("image_format", *FORMATS),
        quality=document.optional("quality", lambda name: document.integer(name, 1, 100)),
        samples_per_shard=document.integer("samples_per_shard", 1),
        num_classes=classes,
        shuffle_seed=document.optional("shuffle_seed", lambda name: document.integer(name, 0)),
        metadata=document.mapping("metadata") if "metadata" in document else {},
        complete=document.boolean("complete") if "complete" in document else False,
        shards=shards,
    )


def _journal(path: Path, known: int) -> list[Any]:
    """The shards that were finished after the manifest was written last."""
    try:
        lines = read_text(path, error=ShardError).splitlines()
    except FileNotFoundError:
        return []
    found: list[Any] = []
    for line in lines:
        try:
            entry = Fields(parse_json(line, what=str(path), error=ShardError), path, ShardError)
            number, shard = entry.integer("number", 0), entry.raw("shard")
        except ShardError:
            continue  # empty, or what a crash cut short
        if number == known + len(found):
            found.append(shard)
    return found


def _shard(entry: Fields) -> ShardInfo:
    entry.only([f.name for f in fields(ShardInfo)])
    counts = Fields(
        entry.mapping("class_counts") if "class_counts" in entry else {}, f"{entry}: class_counts", ShardError
    )
    for label in counts:
        if not re.fullmatch(r"0|[1-9][0-9]{0,9}", label) or int(label) >= 2**31:
            raise ShardError(f"{entry}: class_counts: got label {shown(label)}, accepted: 0 to {2**31 - 1}")
    info = ShardInfo(
        file=entry.text("file", r"shard-[0-9]{6,}\.tar", "shard-NUMBER.tar, beside the manifest"),
        index=entry.text("index", r"shard-[0-9]{6,}\.idx", "shard-NUMBER.idx, beside the manifest"),
        samples=entry.integer("samples", 1),
        bytes=entry.integer("bytes", 1),
        sha256=entry.text("sha256", "[0-9a-f]{64}", "64 hexadecimal digits"),
        class_counts={label: counts.integer(label, 1) for label in counts},
    )
    if info.class_counts and sum(info.class_counts.values()) != info.samples:
        raise ShardError(
            f"{entry}: samples: got {info.samples}, accepted: what class_counts add up to, "
            f"{sum(info.class_counts.values())}"
        )
    return info
