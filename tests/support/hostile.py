"""Files as an attacker, a bad disk or a careless editor leaves them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

BLOCK = 512


def header(
    name: bytes = b"000.jpg",
    size: int | bytes = 0,
    kind: bytes = b"0",
    link: bytes = b"",
    prefix: bytes = b"",
) -> bytes:
    """One block of a tar, with a right checksum whatever it claims; a size as bytes is taken as it is."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124 : 124 + len(field)], block[136:148] = field, b"00000000000\0"
    block[156:157], block[157 : 157 + len(link)] = kind, link
    block[257:265] = b"ustar\x0000"
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def entry(name: bytes, data: bytes, kind: bytes = b"0", **more: Any) -> bytes:
    return header(name, len(data), kind, **more) + padded(data)


def base256(value: int) -> bytes:
    """GNU's way to write a size that octal digits have no room for, or that is negative."""
    return bytes([0xFF if value < 0 else 0x80]) + value.to_bytes(11, "big", signed=value < 0)


def pax(*records: tuple[bytes, bytes]) -> bytes:
    """The data of an extended header."""
    out = b""
    for name, value in records:
        body = b" " + name + b"=" + value + b"\n"
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        out += str(length).encode() + body
    return out


END = bytes(2 * BLOCK)


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG, with a right checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int = 8, height: int = 8, depth: int = 8, colours: int = 2, *more: bytes, data: bytes = b""
) -> bytes:
    """A PNG that claims this size, however little is in it."""
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + body + chunk(b"IEND", b"")


def claims(jpeg: bytes, width: int, height: int) -> bytes:
    """The same JPEG with another size in its frame header."""
    at = next(i for i in range(2, len(jpeg)) if jpeg[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def repaired(data: bytes) -> bytes:
    """The same PNG with every chunk's checksum right again, so that damage gets past it; anything else as it is."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    out, position = data[:8], 8
    while position + 12 <= len(data) and (
        end := position + 8 + int.from_bytes(data[position : position + 4], "big")
    ):
        if end + 4 > len(data):
            break
        out += data[position:end] + struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return out + data[position:]


def mutations(seeds: list[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Damaged copies: flipped, overwritten, cut, doubled, spliced. The same for the same seed."""
    rng = np.random.default_rng(seed)
    kinds: list[Callable[[bytearray], bytearray]] = [
        lambda d: _flip(d, rng, 1),
        lambda d: _flip(d, rng, int(rng.integers(2, 20))),
        lambda d: _put(d, rng, bytes([int(rng.integers(256))])),
        lambda d: _put(d, rng, rng.bytes(4)),
        lambda d: _put(d, rng, [b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"9" * 8][int(rng.integers(4))]),
        lambda d: d[: int(rng.integers(len(d) + 1))],
        lambda d: d[: (at := int(rng.integers(len(d) + 1)))] + d[at + int(rng.integers(1, 64)) :],
        lambda d: d[: (at := int(rng.integers(len(d) + 1)))] + d[max(0, at - int(rng.integers(1, 64))) :],
        lambda d: d + bytearray(rng.bytes(int(rng.integers(1, 600)))),
        lambda d: (
            d[: int(rng.integers(len(d) + 1))]
            + bytearray(seeds[int(rng.integers(len(seeds)))])[int(rng.integers(200)) :]
        ),
    ]
    for _ in range(count):
        data = bytearray(seeds[int(rng.integers(len(seeds)))])
        for _ in range(int(rng.integers(1, 4))):
            data = kinds[int(rng.integers(len(kinds)))](data)
        yield bytes(data)


def _flip(data: bytearray, rng: np.random.Generator, times: int) -> bytearray:
    for _ in range(times if data else 0):
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return data


def _put(data: bytearray, rng: np.random.Generator, what: bytes) -> bytearray:
    at = int(rng.integers(len(data) + 1))
    data[at : at + len(what)] = what
    return data
