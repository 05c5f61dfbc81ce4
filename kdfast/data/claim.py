"""What a writer may go on with, and what it takes: folders that are its own, images and labels that fit."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.data.codec import extension, measure
from kdfast.data.manifest import MANIFEST, Manifest, ShardInfo, read_manifest
from kdfast.errors import ShardError

#: Names of what a writer makes, whole or unfinished.
OURS = re.compile(r"(shard-\d{6,}\.(tar|idx)|manifest\.json)(\.tmp)?|manifest\.journal")


def claim(directory: Path, settings: Manifest, resume: bool) -> Manifest:
    """The manifest to go on from, after making sure that the directory is ours to write."""
    if not (directory / MANIFEST).exists():
        if strangers := sorted(
            path.name for path in directory.glob("*.tar") if not OURS.fullmatch(path.name)
        ):
            raise ShardError(
                f"{directory}: holds tars of no known set ({strangers[0]}, ...); choose another directory"
            )
        return settings
    present = read_manifest(directory)
    if not resume:
        if not present.shards:
            return settings
        raise ShardError(
            f"{directory}: already holds {present.num_samples} images in {len(present.shards)} shards; "
            "pass resume=True to continue that set, or choose another directory"
        )
    theirs, ours = present.settings(), settings.settings()
    if different := [name for name in ours if ours[name] != theirs[name]]:
        facts = "; ".join(
            f"{name} is {_short(theirs[name])} there, {_short(ours[name])} here" for name in different
        )
        raise ShardError(f"{directory}: belongs to another run, so it cannot be resumed: {facts}")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter
        list(pool.map(lambda shard: _check_unchanged(directory, shard), present.shards))
    return present


def _check_unchanged(directory: Path, shard: ShardInfo) -> None:
    """Whoever goes on with a set vouches for all of it, so all of it has to be what was written.

    Raises:
        ShardError: It is not.
    """
    path = directory / shard.file
    if not path.is_file() or path.stat().st_size != shard.bytes:
        raise ShardError(
            f"{path}: is missing or has changed size since it was written; cannot resume this set"
        )
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        raise changed(path)


def changed(path: Path) -> ShardError:
    """The error for a shard whose bytes are not those that its manifest vouches for."""
    return ShardError(
        f"{path}: its SHA-256 is not the manifest's: it was changed since it was written, so this set cannot be "
        "resumed. kdfast.data.check_shards(..., on_error='skip') says what is still sound in it"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 300 else text[:297] + "..."


def checked(
    images: torch.Tensor | NDArray[np.uint8] | Sequence[bytes],
    labels: torch.Tensor | NDArray[np.integer[Any]] | Sequence[int],
    settings: Manifest,
) -> tuple[NDArray[np.uint8] | Sequence[bytes], NDArray[np.int32]]:
    """Images and labels as a writer keeps them: uint8 ``[N, 3, H, W]`` or files, and little-endian int32 ``[N]``.

    Raises:
        TypeError: Images that are not uint8, or labels that are not integers.
        ValueError: A shape, a label or a file out of what the set takes.
    """
    pixels: NDArray[np.uint8] | Sequence[bytes]
    if isinstance(images, (list, tuple)):
        pixels = _checked_files(images, settings.image_format)
    else:
        # Copied: the caller may reuse its buffers while the encoders are still at work.
        pixels = np.array(images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else images)
        if pixels.dtype != np.uint8:
            raise TypeError(f"images: got {pixels.dtype}; must be uint8")
        if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape[2:]:
            raise ValueError(f"images: got shape {list(pixels.shape)}; must be [N, 3, H, W]")
    numbers = np.asarray(labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else labels)
    if numbers.shape != (len(pixels),):
        raise ValueError(f"labels: got shape {list(numbers.shape)} for {len(pixels)} images; must be [N]")
    if numbers.size and numbers.dtype.kind not in "iu":
        raise TypeError(f"labels: got {numbers.dtype}; must be integers")
    limit = settings.num_classes if settings.num_classes is not None else 2**31
    wrong = np.flatnonzero((numbers < 0) | (numbers >= limit))
    if wrong.size:
        raise ValueError(f"labels: label {numbers[wrong[0]]} at row {wrong[0]} is outside [0, {limit})")
    return pixels, numbers.astype("<i4")


def _checked_files(files: Sequence[bytes], image_format: str) -> Sequence[bytes]:
    for row, data in enumerate(files):
        if not isinstance(data, bytes):
            raise TypeError(
                f"images: got {type(data).__name__} at row {row}; must be bytes, or one uint8 array"
            )
        try:
            measure(data)
        except ValueError as error:
            raise ValueError(f"images: the file at row {row} {error}") from None
        if extension(data) != image_format:
            raise ValueError(
                f"images: the file at row {row} is of another format than this {image_format} set"
            )
    return files
