"""Reading the structure of a tar that someone else wrote: USTAR, GNU and PAX, within bounds.

Not the standard library's ``tarfile``: it loops for ever on a negative size (CVE-2025-8194, in every Python up to
3.13.5), reads whatever size an extended header claims into memory, recurses into extended headers of extended headers,
and stops without a word at the first end marker of two archives that were joined. What is needed here is less than it
does: where each regular file's bytes lie.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from kdfast.data.tar import BLOCK, Member

#: Of one extended header: a path has at most 4096 bytes, and nothing else in it is of use here.
_MOST_EXTENDED = 1 << 20
_CHUNK = 1 << 20
_REGULAR, _HARD_LINK, _FOLDERS = frozenset(b"\x0007"), ord("1"), frozenset(b"5D")
_NAMES = {
    ord("2"): "a symbolic link",
    ord("3"): "a device",
    ord("4"): "a device",
    ord("6"): "a pipe",
    ord("M"): "the rest of a file that another archive begins",
    ord("S"): "a sparse file",
}


class TarFault(ValueError):
    """The archive ends or stops making sense before its end marker; what was read before that is sound."""


@dataclass
class _Extended:
    """What the extended headers in front of a file say of it."""

    name: bytes | None = None
    link: bytes | None = None
    size: int | None = None
    sparse: bool = False
    shared: dict[bytes, bytes] = field(default_factory=dict)


def members(stream: BinaryIO) -> Iterator[Member]:
    """Walk the regular files of a tar, or of several that were joined end to end.

    Hard links to files before them are those files. Links, devices and sparse files have no data here and are yielded
    with a fault; folders, hidden files (``._photo.jpg``) and ``__MACOSX`` are not yielded.

    Raises:
        TarFault: The archive is truncated or garbled, or something else follows its end; raised after the sound members
            were yielded.
    """
    size = stream.seek(0, io.SEEK_END)
    position, extended, ended = 0, _Extended(), False
    known: dict[bytes, tuple[int, int]] = {}
    while True:
        block = _block(stream, position, size)
        if block == bytes(BLOCK):
            ended = True
            position = _after_zeros(stream, position, size)
            if position >= size:
                return
            continue
        header = None if len(block) < BLOCK else _Header.parse(block)
        if header is None:
            raise _garbled(block, position, size, ended)
        data = position + BLOCK
        if header.kind in b"xgXLK":
            length = header.size
            if not 0 <= length <= _MOST_EXTENDED:
                raise TarFault(
                    f"tar cannot be read after byte {position} of {size}: an extended header claims {length} bytes, "
                    f"accepted: at most {_MOST_EXTENDED}"
                )
            if data + length > size:
                raise TarFault(f"tar is truncated at byte {position} of {size}, inside an extended header")
            stream.seek(data)
            _extend(extended, header.kind, stream.read(length), position)
            position, ended = _next(data + length), False
            continue
        ended = False
        name = extended.name if extended.name is not None else header.name
        length = header.size if extended.size is None else extended.size
        link = extended.link if extended.link is not None else header.link
        fault, sparse = "", extended.sparse
        extended = _Extended(shared=extended.shared)
        _apply(extended, extended.shared)
        if header.kind == ord("S"):
            while block[482 if block is header.block else 504]:  # further maps of where the holes are
                block = _block(stream, data, size)
                if len(block) < BLOCK:
                    raise TarFault(f"tar is truncated at byte {data} of {size}, inside a sparse file's map")
                data += BLOCK
        if header.kind in _NAMES or header.kind in _FOLDERS or header.kind == _HARD_LINK:
            stored = length if header.kind in b"SMD" else 0
        else:
            stored = length
        if stored < 0:
            raise TarFault(
                f"tar cannot be read after byte {position} of {size}: {_shown(name)} has a size of {stored} bytes"
            )
        if data + stored > size:
            raise TarFault(
                f"tar is truncated inside {_shown(name)}: {data + stored - size} bytes are missing"
            )
        position = _next(data + stored)
        if header.kind in _FOLDERS or name.endswith(b"/") or _hidden(name) or header.kind == ord("V"):
            continue
        if header.kind == _HARD_LINK:
            if link in known:
                data, stored = known[link]
            else:
                fault = f"is a link to {_shown(link)}, which the archive does not hold"
        elif sparse or header.kind in _NAMES:
            fault = (
                f"is {_NAMES.get(header.kind, 'a sparse file')}; its bytes are not in the archive as a file"
            )
        if not fault:
            known[name] = (data, stored)
        yield _member(name, data, stored, fault)


@dataclass(frozen=True)
class _Header:
    block: bytes
    name: bytes
    size: int
    kind: int
    link: bytes

    @classmethod
    def parse(cls, block: bytes) -> _Header | None:
        """The header in a block; ``None`` if its checksum says that it is none."""
        told = _number(block[148:156])
        blank = block[:148] + b" " * 8 + block[156:]
        signed = sum(blank) - 256 * sum(byte > 127 for byte in blank)  # old Suns'
        if told is None or told not in (sum(blank), signed):
            return None
        size = _number(block[124:136])
        if size is None:
            return None
        name, prefix = _text(block[:100]), _text(block[345:500])
        if block[257:263] == b"ustar\0" and prefix:  # GNU keeps times there
            name = prefix + b"/" + name
        return cls(block, name, size, block[156], _text(block[157:257]))


def _number(raw: bytes) -> int | None:
    """Octal text, or GNU's base 256 with its sign; ``None`` if it is neither."""
    if raw[0] in (0x80, 0xFF):
        value = int.from_bytes(raw[1:], "big")
        return value if raw[0] == 0x80 else value - (1 << 8 * (len(raw) - 1))
    digits = _text(raw).strip() or b"0"
    try:
        # int() takes signs and underscores, too.
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


def _text(raw: bytes) -> bytes:
    return raw.split(b"\0", 1)[0]


def _extend(extended: _Extended, kind: int, data: bytes, position: int) -> None:
    if kind == ord("L"):
        extended.name = _text(data)
    elif kind == ord("K"):
        extended.link = _text(data)
    else:
        try:
            records = _records(data)
            if kind == ord("g"):
                extended.shared |= records
            _apply(extended, records)
        except ValueError as error:
            raise TarFault(f"tar cannot be read after byte {position}: an extended header {error}") from None


def _records(data: bytes) -> dict[bytes, bytes]:
    """PAX's records, ``LENGTH NAME=VALUE\\n``."""
    found, at = {}, 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 10)
        digits = data[at:space] if space > at else b""
        if not digits.isdigit():
            raise ValueError("holds a record without a length")
        end = at + int(digits)
        name, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space + 1 or end > len(data) or data[end - 1 : end] != b"\n" or not equals:
            raise ValueError("holds a record that is garbled")
        found[name], at = value, end
    return found


def _apply(extended: _Extended, records: dict[bytes, bytes]) -> None:
    if b"path" in records:
        extended.name = records[b"path"]
    if b"linkpath" in records:
        extended.link = records[b"linkpath"]
    if (size := records.get(b"size")) is not None:
        if not size.isdigit() or len(size) > 19:
            raise ValueError(f"says that a file has {size[:30]!r} bytes")
        extended.size = int(size)
    extended.sparse |= any(name.startswith(b"GNU.sparse.") for name in records)


def _block(stream: BinaryIO, position: int, size: int) -> bytes:
    if position >= size:
        return b""
    stream.seek(position)
    return stream.read(BLOCK)


def _next(end: int) -> int:
    return -(-end // BLOCK) * BLOCK


def _after_zeros(stream: BinaryIO, position: int, size: int) -> int:
    """Where the first block begins that is not all zeros; the file's size if there is none."""
    stream.seek(position)
    while chunk := stream.read(_CHUNK):
        rest = chunk.lstrip(b"\0")
        if rest:
            return (position + len(chunk) - len(rest)) // BLOCK * BLOCK
        position += len(chunk)
    return size


def _garbled(block: bytes, position: int, size: int, ended: bool) -> TarFault:
    if ended:
        return TarFault(
            f"tar has {size - position} bytes behind its end, from byte {position} on, that are no archive"
        )
    if block[:2] == b"\x1f\x8b" or block[:3] == b"BZh" or block[:6] == b"\xfd7zXZ\0":
        return TarFault(
            f"tar cannot be read after byte {position} of {size}: it is compressed; unpack it (images are "
            "compressed already)"
        )
    if position == 0:
        why = f"it has {len(block)} bytes" if len(block) < BLOCK else "it does not begin with a tar's header"
        return TarFault(f"tar cannot be read after byte 0 of {size}: {why}")
    what = "garbled" if len(block) == BLOCK else "truncated"
    return TarFault(f"tar is {what} at byte {position} of {size}: no end-of-archive marker")


def _hidden(name: bytes) -> bool:
    folder, _, file = name.rpartition(b"/")
    return file.startswith(b".") or b"__MACOSX" in folder.split(b"/")


def _shown(name: bytes) -> str:
    return repr(name[:200].decode("utf-8", "backslashreplace"))


def _member(name: bytes, offset: int, size: int, fault: str) -> Member:
    folder, _, file = name.decode("utf-8", "backslashreplace").rpartition("/")
    stem, _, extension = file.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    return Member(key, extension.lower(), offset, size, name.decode("utf-8", "surrogateescape"), fault)
