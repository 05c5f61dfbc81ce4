"""Looking shards over before a decoder does: bad data ends a DALI pipeline, or the interpreter, for good."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdfast.data.codec import EXTENSIONS, MAX_FILE_BYTES, decode
from kdfast.data.manifest import MANIFEST, ShardInfo, read_manifest
from kdfast.data.measures import Measures
from kdfast.data.tar import Member, index_text
from kdfast.data.untar import TarFault, members
from kdfast.documents import read_regular
from kdfast.errors import ShardError

#: Bytes of a label in digits, blanks and all.
_DIGITS = 32


class Content(NamedTuple):
    """What a shard holds, and how to see without reading it that this has not changed.

    Attributes:
        sha256: Of its bytes, in hexadecimal; empty if it could not be read.
        stamp: See :func:`stamp_of`.
    """

    sha256: str
    stamp: tuple[int, ...]


def stamp_of(descriptor: int) -> tuple[int, ...]:
    """Which file this is, how large, and when it was last written: as long as that stays, so do its bytes."""
    facts = os.fstat(descriptor)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


class Fault(NamedTuple):
    """Something wrong with a shard (empty ``key``) or with one of its records."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.shard}, key {self.key!r}: {self.reason}" if self.key else f"{self.shard}: {self.reason}"
        )


@dataclass(frozen=True)
class Verdict:
    """What a walk over one shard found; it depends on the shard's bytes alone.

    Attributes:
        records: ``(key, image offset, image size, label, height, width)`` of each sound record.
        faults: ``(key, reason)`` of each unsound one; an empty key stands for the shard itself.
        index: SHA-256 of the index file that would describe this tar.
    """

    records: list[tuple[str, int, int, int, int, int]]
    faults: list[tuple[str, str]]
    index: str


@dataclass(frozen=True)
class RecordTable:
    """The sound records of a set, and where their bytes are.

    Attributes:
        paths: Of the shards.
        shard: int64 ``[N]``, index into ``paths``.
        offset: int64 ``[N]``, where the image file starts in its shard.
        size: int64 ``[N]``, its bytes.
        label: int64 ``[N]``.
        height, width: int64 ``[N]``, of the upright image.
        keys: Names of the records.
        faults: What was found wrong.
        fingerprint: Of all of this, to tell whether a loader's state belongs to it.
        num_classes: As the manifest has it.
        contents: Of each shard, what it was when it was looked at.
    """

    paths: list[Path]
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    keys: list[str]
    faults: list[Fault]
    fingerprint: str
    num_classes: int | None
    contents: list[Content]

    def __len__(self) -> int:
        return len(self.keys)

    def fault(self, record: int, reason: str) -> Fault:
        """A fault of one of these records, found later."""
        return Fault(self.paths[self.shard[record]].name, self.keys[record], reason)


def check_shards(directory: str | os.PathLike[str], *, on_error: str = "raise") -> RecordTable:
    """Check every shard of a set once: checksum, tar structure, image headers, labels, index.

    A set is what its manifest lists; a folder of WebDataset tars without a manifest is taken as it is. How large a
    shard's images are is kept beside it in ``.preflight/``, by checksum, where the folder can be written; labels and
    places always come from the shard itself. A shard whose checksum is not the manifest's is salvaged under
    ``"skip"``: each of its images is decoded in full, strictly.

    Args:
        directory: A folder of shards.
        on_error: ``"raise"`` for the first fault, ``"skip"`` to leave faulty records out and list them.

    Raises:
        ShardError: There are no shards; ``"raise"`` and something is wrong; nothing sound is left; or the disk fails
            while a shard is read, which leaving it out would hide.
    """
    folder = Path(directory)
    shards, num_classes = _shards(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # Hashing and reading release the interpreter; the walk itself does not.
        found = list(pool.map(lambda shard: _examine(folder, shard), shards))
    verdicts = [verdict for verdict, _ in found]
    faults: list[Fault] = []
    rows: list[tuple[int, int, int, int, int, int]] = []
    keys: list[str] = []
    for number, (shard, verdict) in enumerate(zip(shards, verdicts)):
        faults += [Fault(shard.file, key, reason) for key, reason in verdict.faults]
        for key, offset, size, label, height, width in verdict.records:
            if label < 0 or (num_classes is not None and label >= num_classes):
                limit = num_classes if num_classes is not None else 2**31
                faults.append(Fault(shard.file, key, f"label {label} is outside [0, {limit})"))
                continue
            rows.append((number, offset, size, label, height, width))
            keys.append(key)
    if faults and on_error == "raise":
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise ShardError(f"{folder}: {faults[0]}{more}; on_error='skip' leaves faulty records out")
    if not rows:
        why = f"; the first of {len(faults)} faults: {faults[0]}" if faults else ""
        raise ShardError(f"{folder}: holds no usable images{why}")
    columns = np.array(rows, dtype=np.int64).T
    digest = hashlib.sha256(columns.tobytes())
    digest.update("\n".join(content.sha256 for _, content in found).encode())
    shard_column, offset, size, label, height, width = columns
    return RecordTable(
        paths=[folder / shard.file for shard in shards],
        shard=shard_column,
        offset=offset,
        size=size,
        label=label,
        height=height,
        width=width,
        keys=keys,
        faults=faults,
        fingerprint=digest.hexdigest()[:32],
        num_classes=num_classes,
        contents=[content for _, content in found],
    )


def _shards(folder: Path) -> tuple[list[ShardInfo], int | None]:
    """What the manifest lists, or the tars of a folder that has none (with an empty checksum)."""
    if not folder.is_dir():
        raise ShardError(f"{folder}: is not a folder")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        if not manifest.shards:
            raise ShardError(f"{folder}: its manifest lists no finished shard")
        return list(manifest.shards), manifest.num_classes
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ShardError(f"{folder}: holds neither a {MANIFEST} nor any .tar shard")
    return [ShardInfo(tar.name, tar.with_suffix(".idx").name, 0, 0, "") for tar in tars], None


def _examine(folder: Path, shard: ShardInfo) -> tuple[Verdict, Content]:
    """The verdict on one shard, with the faults that its surroundings add, and what it holds now."""
    path = folder / shard.file
    try:
        with open_shard(path) as stream:
            stamp = stamp_of(stream.fileno())
            actual = sha256_of(stream)
            altered = bool(shard.sha256) and actual != shard.sha256
            measures = Measures(folder, actual)
            verdict = _walk(stream, measures, strict=altered)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        return Verdict([], [("", f"cannot be read: {error.strerror or error}")], ""), Content("", ())
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not altered:
        measures.keep()
    faults = []
    if altered:
        faults.append(
            ("", f"its SHA-256 is {actual[:16]}…, the manifest says {shard.sha256[:16]}…: it was changed")
        )
    elif shard.sha256:
        faults += _contradictions(shard, verdict)
    text = _index_of(folder / shard.index)
    if text is not None and hashlib.sha256(text).hexdigest() != verdict.index and not altered:
        faults.append(("", f"its index {shard.index} is stale: it does not describe this tar"))
    return Verdict(verdict.records, faults + list(verdict.faults), verdict.index), Content(actual, stamp)


def _contradictions(shard: ShardInfo, verdict: Verdict) -> list[tuple[str, str]]:
    """Where the manifest and the very bytes that it vouches for say different things."""
    if verdict.faults:
        return []
    counts = Counter(label for _, _, _, label, _, _ in verdict.records)
    if shard.samples != len(verdict.records):
        return [("", f"holds {len(verdict.records)} images, the manifest says {shard.samples}")]
    told = {int(label): count for label, count in shard.class_counts.items()}
    if told and told != counts:
        label = min(label for label in told.keys() | counts.keys() if told.get(label, 0) != counts[label])
        return [
            ("", f"holds {counts[label]} images of class {label}, the manifest says {told.get(label, 0)}")
        ]
    return []


def open_shard(path: Path) -> BinaryIO:
    """Open a tar for reading; not a pipe or a device, which would never end.

    Raises:
        OSError: It cannot be opened.
    """
    # Not blocking: opening a named pipe to read waits for a writer otherwise.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "it is a folder, a pipe or a device, not a file", str(path))
    return open(descriptor, "rb")


def _index_of(path: Path) -> bytes | None:
    try:
        return read_regular(path)
    except OSError:
        return None


def sha256_of(stream: BinaryIO) -> str:
    """Checksum of what is left of a stream, in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _walk(stream: BinaryIO, measures: Measures, *, strict: bool) -> Verdict:
    samples: dict[str, list[Member]] = {}
    repeated: set[str] = set()
    faults: list[tuple[str, str]] = []
    try:
        for member in members(stream):
            parts = samples.setdefault(member.key, [])
            if any(part.extension == member.extension for part in parts):
                repeated.add(member.key)
            else:
                parts.append(member)
    except TarFault as error:
        faults.append(("", str(error)))
    if not samples and not faults:
        faults.append(("", "holds no files"))
    faults += [
        (key, "appears more than once in the shard; only the first counts") for key in sorted(repeated)
    ]
    records = []
    for key, parts in samples.items():
        try:
            records.append((key, *_record(stream, parts, measures, strict=strict)))
        except ValueError as error:
            faults.append((key, str(error)))
    index = hashlib.sha256(index_text(list(samples.values()))).hexdigest()
    return Verdict(records, faults, index)


def _record(
    stream: BinaryIO, parts: Sequence[Member], measures: Measures, *, strict: bool
) -> tuple[int, int, int, int, int]:
    images = [part for part in parts if part.extension in EXTENSIONS]
    labels = [part for part in parts if part.extension == "i32"] or [
        part for part in parts if part.extension == "cls"
    ]
    if faults := [f"its .{part.extension} {part.fault}" for part in (*images, *labels) if part.fault]:
        raise ValueError(faults[0])
    if len(images) != 1:
        raise ValueError(f"has {len(images)} images (.{', .'.join(EXTENSIONS)}); must have one")
    if not labels:
        raise ValueError("has no label (.i32, or WebDataset's .cls)")
    if labels[0].extension == "i32" and labels[0].size != 4:
        raise ValueError(f"its label has {labels[0].size} bytes; an int32 has 4")
    image = images[0]
    if image.size > MAX_FILE_BYTES:
        raise ValueError(f"its image has {image.size} bytes, accepted: at most {MAX_FILE_BYTES}")
    label = _label(stream, labels[0])
    height, width = measures.of(image.offset, image.size, lambda: _read(stream, image))
    if strict:
        decode(_read(stream, image), strict=True)
    return image.offset, image.size, label, height, width


def _label(stream: BinaryIO, member: Member) -> int:
    """A label of our own shards, or one in digits, as WebDataset's own tools write them."""
    if member.extension == "i32":
        return int.from_bytes(_read(stream, member), "little", signed=True)
    digits = _read(stream, member).strip() if member.size <= _DIGITS else b""
    if not digits.isdigit() or len(digits) > 10 or int(digits) >= 2**31:
        raise ValueError(f"its label (.cls) is no number from 0 to {2**31 - 1} in digits")
    return int(digits)


def _read(stream: BinaryIO, member: Member) -> bytes:
    stream.seek(member.offset)
    return stream.read(member.size)
