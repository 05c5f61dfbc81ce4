"""Shards as WebDataset tars, written, and described for DALI's own reader."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass

BLOCK = 512


@dataclass(frozen=True)
class Record:
    """One encoded sample: the image file, its label (little-endian int32 in shards of our own), and optional JSON."""

    key: str
    image: bytes
    label: bytes
    extra: bytes | None = None


@dataclass(frozen=True)
class Member:
    """One file of a sample inside a tar: where its data starts, and how long it is.

    Attributes:
        key: The sample's name: the file's up to its first dot, with its folder; what is no UTF-8 is written out.
        extension: What follows that dot, in lower case.
        offset: Where its data starts.
        size: How many bytes those are.
        name: As the archive has it; bytes that are no UTF-8 as lone surrogates, as Python's file names have them.
        fault: Why the file cannot be used; empty if it can.
    """

    key: str
    extension: str
    offset: int
    size: int
    name: str
    fault: str = ""


def pack(records: Iterable[Record], extension: str, *, label: str = "i32") -> tuple[memoryview, bytes]:
    """Lay records out as a tar and describe it as a DALI index.

    The result depends on the records alone (no clock, no user), so that a resumed set is the same byte for
    byte.

    Args:
        records: The samples, in order.
        extension: Of the images.
        label: Of the labels.

    Returns:
        The tar, and the text of its index.
    """
    buffer = io.BytesIO()
    samples: list[list[Member]] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for record in records:
            parts = [(extension, record.image), (label, record.label)]
            if record.extra is not None:
                parts.append(("json", record.extra))
            sample = []
            for suffix, data in parts:
                entry = tarfile.TarInfo(f"{record.key}.{suffix}")
                entry.size = len(data)
                sample.append(Member(record.key, suffix, archive.offset + BLOCK, len(data), entry.name))
                archive.addfile(entry, io.BytesIO(data))
            samples.append(sample)
    return buffer.getbuffer(), index_text(samples)


def index_text(samples: list[list[Member]]) -> bytes:
    """The index that ``fn.readers.webdataset(index_paths=...)`` reads, as NVIDIA's wds2idx v1.2 writes it."""
    lines = [f"v1.2 {len(samples)}"]
    lines += [
        " ".join(f"{part.extension} {part.offset} {part.size} {part.name}" for part in sample)
        for sample in samples
    ]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
