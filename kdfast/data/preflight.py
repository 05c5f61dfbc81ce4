"""Looking shards over before a decoder does: bad data ends a DALI pipeline, or the interpreter, for good."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdfast.data.codec import EXTENSIONS, decode, measure
from kdfast.data.manifest import MANIFEST, ShardInfo, read_manifest, write_atomic
from kdfast.data.tar import Member, TarFault, index_text, members
from kdfast.errors import ShardError

# Raised whenever what a verdict says could change for the same bytes.
_CACHE_VERSION = 1


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
    """What a walk over one shard found; it depends on the shard's bytes alone, so its checksum caches it.

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

    def __len__(self) -> int:
        return len(self.keys)

    def fault(self, record: int, reason: str) -> Fault:
        """A fault of one of these records, found later."""
        return Fault(self.paths[self.shard[record]].name, self.keys[record], reason)


def check_shards(directory: str | os.PathLike[str], *, on_error: str = "raise") -> RecordTable:
    """Check every shard of a set once: checksum, tar structure, image headers, labels, index.

    A set is what its manifest lists; a folder of WebDataset tars without a manifest is taken as it is. What a
    shard's bytes say is cached beside it in ``.preflight/``, by checksum, where the folder can be written. A
    shard whose checksum is not the manifest's is salvaged under ``"skip"``: each of its images is decoded in
    full, strictly.

    Args:
        directory: A folder of shards.
        on_error: ``"raise"`` for the first fault, ``"skip"`` to leave faulty records out and list them.

    Raises:
        ShardError: There are no shards; ``"raise"`` and something is wrong; or nothing sound is left.
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
    digest.update("\n".join(hashed for _, hashed in found).encode())
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


def _examine(folder: Path, shard: ShardInfo) -> tuple[Verdict, str]:
    """The verdict on one shard, with the faults that its surroundings add, and the checksum it has now."""
    path = folder / shard.file
    try:
        with open(path, "rb") as stream:
            actual = _sha256(stream)
            altered = bool(shard.sha256) and actual != shard.sha256
            verdict = None if altered else _cached(folder, actual)
            if verdict is None:
                verdict = _walk(stream, strict=altered)
                if not altered:
                    _cache(folder, actual, verdict)
    except OSError as error:
        return Verdict([], [("", f"cannot be read: {error.strerror or error}")], ""), ""
    faults = []
    if altered:
        faults.append(
            ("", f"its SHA-256 is {actual[:16]}…, the manifest says {shard.sha256[:16]}…: it was changed")
        )
    with contextlib.suppress(OSError):
        text = (folder / shard.index).read_bytes()
        if hashlib.sha256(text).hexdigest() != verdict.index and not altered:
            faults.append(("", f"its index {shard.index} is stale: it does not describe this tar"))
    return Verdict(verdict.records, faults + list(verdict.faults), verdict.index), actual


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _walk(stream: BinaryIO, *, strict: bool) -> Verdict:
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
            records.append((key, *_record(stream, parts, strict=strict)))
        except ValueError as error:
            faults.append((key, str(error)))
    index = hashlib.sha256(index_text(list(samples.values()))).hexdigest()
    return Verdict(records, faults, index)


def _record(stream: BinaryIO, parts: Sequence[Member], *, strict: bool) -> tuple[int, int, int, int, int]:
    images = [part for part in parts if part.extension in EXTENSIONS]
    labels = [part for part in parts if part.extension == "i32"]
    if len(images) != 1:
        raise ValueError(f"has {len(images)} images (.{', .'.join(EXTENSIONS)}); must have one")
    if not labels:
        raise ValueError("has no label (.i32)")
    data = _read(stream, labels[0])
    if len(data) != 4:
        raise ValueError(f"its label has {len(data)} bytes; an int32 has 4")
    label = int.from_bytes(data, "little", signed=True)
    image = _read(stream, images[0])
    height, width = measure(image)
    if strict:
        decode(image, strict=True)
    return images[0].offset, images[0].size, label, height, width


def _read(stream: BinaryIO, member: Member) -> bytes:
    stream.seek(member.offset)
    return stream.read(member.size)


def _cached(folder: Path, checksum: str) -> Verdict | None:
    try:
        document = json.loads((folder / ".preflight" / f"{checksum}.json").read_text())
        if document.pop("version") != _CACHE_VERSION:
            return None
        records = [tuple(record) for record in document["records"]]
        return Verdict(records, [tuple(fault) for fault in document["faults"]], document["index"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cache(folder: Path, checksum: str, verdict: Verdict) -> None:
    # A read-only folder is walked again each time; so is a full disk.
    with contextlib.suppress(OSError):
        (folder / ".preflight").mkdir(exist_ok=True)
        text = json.dumps({"version": _CACHE_VERSION, **asdict(verdict)}, separators=(",", ":"))
        write_atomic(folder / ".preflight" / f"{checksum}.json", text.encode())
