"""What JPEG, PNG and WebP files say of themselves before anything is decoded: size, orientation, visible damage."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Any

#: Pixels that an image may have: Pillow's own default bound against decompression bombs, 256 MiB of RGB.
MAX_PIXELS = 89_478_485
#: Bytes that an image file may have.
MAX_FILE_BYTES = 256 << 20

_PNG = b"\x89PNG\r\n\x1a\n"
# SOF0-SOF15 without DHT (C4), JPG (C8) and DAC (CC), which share the range.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: Baseline, extended and progressive: what every decoder here reads. Others are lossless, hierarchical or arithmetic.
_DECODABLE = frozenset({0xC0, 0xC1, 0xC2})
_START_OF_SCAN, _END_OF_IMAGE, _EXIF = 0xDA, 0xD9, 0xE1
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
#: A marker inside entropy-coded data: not a stuffed zero, a restart or a fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
#: Bit depths by colour type (grey, RGB, palette, grey and alpha, RGB and alpha), without 16 bits a channel.
_DEPTHS = {0: (1, 2, 4, 8), 2: (8,), 3: (1, 2, 4, 8), 4: (8,), 6: (8,)}
#: The flag of VP8X without which decoders pass over an EXIF chunk.
_WEBP_EXIF = 0x08


@dataclass(frozen=True)
class Header:
    """What a file says of its image.

    Attributes:
        height, width: As it is stored.
        channels: 4 for CMYK in a JPEG.
        orientation: EXIF's, 1 (upright) to 8.
    """

    height: int
    width: int
    channels: int
    orientation: int = 1

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width after the turn that the orientation asks for."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def is_jpeg(data: bytes) -> bool:
    """Whether the bytes begin as a JPEG does."""
    return data[:2] == b"\xff\xd8"


def is_webp(data: bytes) -> bool:
    """Whether the bytes begin as a WebP does."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def extension(data: bytes) -> str:
    """The name's end that fits a file which has been measured: ``jpg``, ``png`` or ``webp``."""
    return "jpg" if is_jpeg(data) else "webp" if is_webp(data) else "png"


def is_grey_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG of one channel; for files whose header has been read before."""
    position = 2
    while is_jpeg(data) and position + 10 <= len(data):
        marker = data[position + 1]
        if marker in _START_OF_FRAME:
            return data[position + 9] == 1
        fill = marker == 0xFF or marker in _STANDALONE
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        position += (1 if marker == 0xFF else 2) if fill else 2 + length
    return False


def is_turned_webp(data: bytes) -> bool:
    """Whether this is a WebP that its EXIF orientation turns; for files whose header has been read before."""
    return is_webp(data) and read_header(data).orientation != 1


def read_header(data: bytes) -> Header:
    """Read a JPEG's, PNG's or WebP's header, and look through its segments or chunks to its end.

    Raises:
        ValueError: It is none of them, is visibly damaged, or too large; the message says how.
    """
    if not data:
        raise ValueError("has 0 bytes")
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"has {len(data)} bytes, accepted: at most {MAX_FILE_BYTES}")
    if data[:8] == _PNG:
        return _png(data)
    if is_jpeg(data):
        return _jpeg(data)
    if is_webp(data):
        return _webp(data)
    raise ValueError(f"is neither JPEG nor PNG nor WebP (it starts with {data[:4].hex()})")


def _sized(what: str, height: int, width: int) -> None:
    if min(height, width) == 0:
        raise ValueError(f"{what} has no size")
    if height * width > MAX_PIXELS:
        raise ValueError(f"{what} claims {width}x{height} pixels, accepted: at most {MAX_PIXELS}")


def _jpeg(data: bytes) -> Header:
    """Walk the marker segments, and find the end of each scan."""
    position, exif = 2, 1
    frame: tuple[int, int, int] | None = None
    scanned = False
    while position + 2 <= len(data):
        if data[position] != 0xFF:
            raise ValueError(f"JPEG has garbage where a marker should be (byte {position})")
        marker = data[position + 1]
        if marker == 0xFF or marker in _STANDALONE:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == _END_OF_IMAGE:
            if frame is None or not scanned:
                raise ValueError("JPEG holds no scan: it is truncated")
            return Header(*frame, exif)
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if length < 2 or len(body) != length - 2:
            raise ValueError(f"JPEG segment at byte {position} runs past the end: it is truncated")
        if marker in _START_OF_FRAME:
            if frame is not None:
                raise ValueError("JPEG has a second frame")
            frame = _jpeg_frame(marker, body)
        elif marker == _EXIF and body[:6] == b"Exif\0\0":
            exif = _orientation(body[6:])
        position += 2 + length
        if marker == _START_OF_SCAN:
            if frame is None:
                raise ValueError("JPEG scan comes before a frame with a size")
            scanned, found = True, _MARKER.search(data, position)
            if found is None:
                raise ValueError("JPEG has no end-of-image marker: it is truncated")
            position = found.start()
    raise ValueError(
        "JPEG has no end-of-image marker: it is truncated"
        if scanned
        else "JPEG holds no scan: it is truncated"
    )


def _jpeg_frame(marker: int, body: bytes) -> tuple[int, int, int]:
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise ValueError("JPEG frame header is too short")
    if marker not in _DECODABLE:
        raise ValueError(f"JPEG is of a kind (SOF{marker - 0xC0}) that decoders do not read")
    if body[0] != 8:
        raise ValueError(f"JPEG has {body[0]} bits a channel; only 8 are accepted")
    height, width, channels = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"), body[5]
    _sized("JPEG", height, width)
    if channels not in (1, 3, 4):
        raise ValueError(f"JPEG has {channels} channels, accepted: 1, 3 or 4")
    return height, width, channels


def _orientation(tiff: bytes) -> int:
    """EXIF tag 274 in a TIFF header's first directory; 1 (upright) when absent or nonsense."""
    order: Any = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    start = number(4, 4)
    for entry in range(start + 2, min(start + 2 + 12 * number(start, 2), len(tiff) - 11), 12):
        if number(entry, 2) == 0x0112:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _png(data: bytes) -> Header:
    position, header, exif = 8, None, 1
    seen: set[bytes] = set()
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind, end = data[position + 4 : position + 8], position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"PNG chunk {kind!r} at byte {position} fails its checksum")
        if (kind == b"IHDR") != (header is None):
            raise ValueError("PNG must begin with one IHDR chunk")
        body = data[position + 8 : end]
        if header is None:
            header = _png_header(body)
        elif kind == b"eXIf":
            exif = _orientation(body)
        elif kind == b"PLTE" and (length % 3 or not 3 <= length <= 768):
            raise ValueError(f"PNG palette has {length} bytes, accepted: 3 for each of at most 256 colours")
        elif kind == b"IDAT" and header[2] == 3 and b"PLTE" not in seen:
            raise ValueError("PNG has colours by number, but no palette (PLTE)")
        elif kind == b"IEND":
            if b"IDAT" not in seen:
                raise ValueError("PNG has no image data (IDAT)")
            return Header(header[0], header[1], 3, exif)
        elif kind not in (b"PLTE", b"IDAT") and not kind[0] & 0x20:
            raise ValueError(f"PNG has a chunk {kind!r} that decoders must know, and do not")
        seen.add(kind)
        position = end + 4
    raise ValueError("PNG has no IEND chunk: it is truncated")


def _png_header(body: bytes) -> tuple[int, int, int]:
    if len(body) != 13:
        raise ValueError(f"PNG header (IHDR) has {len(body)} bytes; it has 13")
    width, height = int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big")
    depth, colours, compression, filtering, interlace = body[8:13]
    _sized("PNG", height, width)
    if depth == 16:
        raise ValueError("PNG has 16 bits a channel; only 8 are accepted")
    if depth not in _DEPTHS.get(colours, ()):
        raise ValueError(f"PNG has colour type {colours} with {depth} bits, which there is not")
    if compression or filtering or interlace > 1:
        raise ValueError(f"PNG has methods {compression}, {filtering}, {interlace}, which there are not")
    return height, width, colours


def _webp(data: bytes) -> Header:
    """Walk the RIFF container: one still picture, lossy (VP8) or lossless (VP8L), and what describes it."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise ValueError(f"WebP says that it has {end} bytes and has {len(data)}: it is truncated")
    position, exif, flags = 12, 1, 0
    canvas: tuple[int, int] | None = None
    frame: tuple[int, int] | None = None
    while position + 8 <= end:
        kind = data[position : position + 4]
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        body = data[position + 8 : position + 8 + length]
        if position + 8 + length > end:
            raise ValueError(f"WebP chunk {kind!r} at byte {position} runs past the end: it is truncated")
        if kind == b"VP8X" and position == 12:
            if length != 10:
                raise ValueError(f"WebP header (VP8X) has {length} bytes; it has 10")
            flags = body[0]
            canvas = 1 + int.from_bytes(body[7:10], "little"), 1 + int.from_bytes(body[4:7], "little")
        elif kind in (b"ANIM", b"ANMF"):
            raise ValueError("WebP is an animation; only one still picture is accepted")
        elif kind in (b"VP8 ", b"VP8L"):
            if frame is not None:
                raise ValueError("WebP has a second picture")
            frame = _webp_frame(kind, body)
        elif kind == b"EXIF" and flags & _WEBP_EXIF:
            exif = _orientation(body.removeprefix(b"Exif\0\0"))
        position += 8 + length + length % 2
    if frame is None:
        raise ValueError("WebP holds no picture (VP8 or VP8L): it is truncated")
    if canvas not in (None, frame):
        raise ValueError(f"WebP has a canvas of {canvas} and a picture of {frame}: they must be of one size")
    return Header(*frame, 3, exif)


def _webp_frame(kind: bytes, body: bytes) -> tuple[int, int]:
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        if len(body) < 5 or body[0] != 0x2F or bits >> 29:
            raise ValueError("WebP picture (VP8L) does not begin as one does")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        tag = int.from_bytes(body[:3], "little")
        # A key frame (bit 0), that is shown (bit 4), and its first partition's 19 bits of length.
        if len(body) < 10 or tag & 1 or not tag >> 4 & 1 or body[3:6] != b"\x9d\x01\x2a":
            raise ValueError("WebP picture (VP8) does not begin as one does")
        if tag >> 5 > len(body) - 10:
            raise ValueError("WebP picture (VP8) is shorter than it says: it is truncated")
        width, height = (int.from_bytes(body[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    _sized("WebP", height, width)
    return height, width
