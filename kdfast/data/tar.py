"""Shards as WebDataset tars, and the index file that DALI's own reader asks for."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512


@dataclass(frozen=True)
class Record:
    """One encoded sample: the image file, its label as little-endian int32, and optional JSON."""

    key: str
    image: bytes
    label: bytes
    extra: bytes | None = None


@dataclass(frozen=True)
class Member:
    """One file of a sample inside a tar: where its data starts, and how long it is."""

    key: str
    extension: str
    offset: int
    size: int
    name: str


class TarFault(ValueError):
    """The archive ends or stops making sense before its end marker; what was read before that is sound."""


def pack(records: Iterable[Record], extension: str) -> tuple[memoryview, bytes]:
    """Lay records out as a tar and describe it as a DALI index.

    The result depends on the records alone (no clock, no user), so that a resumed set is the same byte for
    byte.

    Returns:
        The tar, and the text of its index.
    """
    buffer = io.BytesIO()
    samples: list[list[Member]] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for record in records:
            parts = [(extension, record.image), ("i32", record.label)]
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
    return ("\n".join(lines) + "\n").encode()


def members(stream: BinaryIO) -> Iterator[Member]:
    """Walk the regular files of a tar, USTAR, GNU or PAX.

    Raises:
        TarFault: The archive is truncated or garbled; raised after the sound members were yielded.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    end = 0
    try:
        # tarfile resolves the PAX and GNU headers that carry long names.
        archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 - the stream is the caller's
        while (entry := archive.next()) is not None:
            # Or a long-lived walk would hold every header it has seen.
            archive.members = []  # type: ignore[attr-defined]
            if not entry.isreg():
                end = entry.offset_data
                continue
            end = entry.offset_data + entry.size
            if end > size:
                raise TarFault(f"tar is truncated inside {entry.name!r}: {end - size} bytes are missing")
            folder, _, name = entry.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            yield Member(key, extension.lower(), entry.offset_data, entry.size, entry.name)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise TarFault(f"tar cannot be read after byte {end} of {size}: {error}") from error
    # tarfile takes the end of the file, or garbage in place of a header, for the end of the archive.
    end = -(-end // BLOCK) * BLOCK
    stream.seek(end)
    marker = stream.read(BLOCK)
    if marker != bytes(BLOCK):
        what = "garbled" if len(marker) == BLOCK else "truncated"
        raise TarFault(f"tar is {what} at byte {end} of {size}: no end-of-archive marker")
