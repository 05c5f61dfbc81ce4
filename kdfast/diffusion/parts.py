"""How ranks share a set of shards: each writes whole shards into a part of its own; the last to finish joins them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdfast.data.manifest import read_manifest
from kdfast.diffusion.notes import REFUSED, SCORES
from kdfast.disk import sync_directory
from kdfast.errors import ShardError

_LOCK = ".merge"
_PARTS = "parts"


def shard_range(images: int, samples_per_shard: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and one-past-last image of a rank: whole shards, spread evenly; none for ranks beyond the shards."""
    shards = -(-images // samples_per_shard)
    first, last = rank * shards // world_size, (rank + 1) * shards // world_size
    return min(first * samples_per_shard, images), min(last * samples_per_shard, images)


def part_directory(root: Path, start: int, stop: int) -> Path:
    """Where the images from ``start`` to ``stop`` are written until all parts are there."""
    return root / _PARTS / f"{start:09d}-{stop:09d}"


def check_same_run(directory: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse a directory that holds another run's images.

    Raises:
        ShardError: Names every setting that differs, as it is there and here.
    """
    if not (directory / "manifest.json").exists():
        return
    present = read_manifest(directory).metadata
    differing = [key for key in {**metadata, **present} if present.get(key) != metadata.get(key)]
    if differing:
        facts = "; ".join(
            f"{key} is {present.get(key)!r} there, {metadata.get(key)!r} here" for key in differing
        )
        raise ShardError(f"{directory}: belongs to another run: {facts}")


def joined(root: Path, images: int, *, resume: bool) -> bool:
    """Whether ``root`` already holds a whole set, put together from parts or not.

    Raises:
        ShardError: It is of another size, or is not being resumed.
    """
    if not (root / "manifest.json").exists():
        return False
    present = read_manifest(root)
    if present.complete and not (resume and present.num_samples == images):
        raise ShardError(
            f"{root}: already holds a complete set of {present.num_samples} images, {images} were asked for; choose "
            "another directory, resume with the same size, or let a single process extend it"
        )
    if present.complete:  # a crash may have come before the parts and the lock were removed
        shutil.rmtree(root / _PARTS, ignore_errors=True)
        (root / _LOCK).unlink(missing_ok=True)
    return present.complete


def merge_parts(root: Path, images: int, samples_per_shard: int, world_size: int) -> bool:
    """Join the ranks' parts into one set under ``root``, if all of them are finished.

    Shards are hard-linked before the manifest is written and the parts are removed after it, so that a crash at any
    point leaves either the parts or the set whole.

    Returns:
        Whether the set is complete now.
    """
    ranges = {shard_range(images, samples_per_shard, rank, world_size) for rank in range(world_size)}
    parts = [part_directory(root, start, stop) for start, stop in sorted(ranges) if stop > start]
    root.mkdir(parents=True, exist_ok=True)
    with open(root / _LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        whole = _merge(root, parts)
    if whole:
        (root / _LOCK).unlink(missing_ok=True)
    return whole


def _merge(root: Path, parts: list[Path]) -> bool:
    if (root / "manifest.json").exists() and read_manifest(root).complete:
        return True
    if not all((part / "manifest.json").exists() and read_manifest(part).complete for part in parts):
        return False
    manifests = [read_manifest(part) for part in parts]
    if strangers := [i for i, m in enumerate(manifests) if m.settings() != manifests[0].settings()]:
        raise ShardError(
            f"{parts[strangers[0]]}: belongs to another run than {parts[0]}; they cannot be joined"
        )
    for part, manifest in zip(parts, manifests):
        for shard in manifest.shards:
            for name in (shard.file, shard.index):
                _link(part / name, root / name)
    for name in (REFUSED, SCORES):
        if present := [part / name for part in parts if (part / name).exists()]:
            (root / name).write_text("".join(path.read_text() for path in present))
    sync_directory(root)
    replace(manifests[0], shards=tuple(s for m in manifests for s in m.shards), complete=True).write(root)
    shutil.rmtree(root / _PARTS)
    return True


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
