"""Small shards to test with: sound ones, and every kind of broken one."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdfast.data import ShardWriter


def pictures(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Smooth random images, which survive JPEG: uint8 [count, 3, size, size]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(a).resize((size, size), Image.Resampling.BICUBIC)) for a in small]
    return torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).contiguous()


def numbered(count: int, size: int = 8) -> torch.Tensor:
    """Flat images, each one telling its number (up to 4096) in its pixels, for PNG shards."""
    number = torch.arange(count)
    colour = torch.stack([number % 16 * 16, number // 16 % 16 * 16, number // 256 * 16], 1).to(torch.uint8)
    return colour[:, :, None, None].expand(-1, -1, size, size).contiguous()


def numbers(images: torch.Tensor) -> list[int]:
    """Undo `numbered` on a float batch in [0, 1]."""
    colour = (images[:, :, 0, 0] * 255 / 16).round().long()
    return (colour[:, 0] + 16 * colour[:, 1] + 256 * colour[:, 2]).tolist()


def write_numbered(directory: Path, count: int, *, per_shard: int = 10, classes: int = 10) -> Path:
    with ShardWriter(
        directory, samples_per_shard=per_shard, image_format="png", num_classes=classes
    ) as writer:
        writer.write(numbered(count), torch.arange(count) % classes)
    return directory


def jpeg(size: int = 16, seed: int = 0, mode: str = "RGB", **options: object) -> bytes:
    image = Image.fromarray(pictures(1, size, seed)[0].permute(1, 2, 0).numpy()).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0, **options)
    return buffer.getvalue()


def label(value: int) -> bytes:
    return struct.pack("<i", value)


def good(count: int = 4, classes: int = 10) -> list[tuple[str, bytes]]:
    """The files of a sound shard, to be spoilt."""
    files = []
    for i in range(count):
        files += [(f"{i:03d}.jpg", jpeg(seed=i)), (f"{i:03d}.i32", label(i % classes))]
    return files


def tar(path: Path, files: Sequence[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def checksums(directory: Path) -> dict[str, str]:
    """What is in a directory of shards, apart from caches and the lock."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name != ".lock"
    }
