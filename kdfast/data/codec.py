"""Encoding and decoding of one image, and what can be told of it without decoding."""

from __future__ import annotations

import functools
import io
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdfast.errors import require

if TYPE_CHECKING:
    from collections.abc import Callable

Image = NDArray[np.uint8]

EXTENSIONS = ("jpg", "jpeg", "png")
_PNG = b"\x89PNG\r\n\x1a\n"
# SOF0-SOF15 without DHT (C4), JPG (C8) and DAC (CC), which share the range.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN, _END_OF_IMAGE, _EXIF = 0xDA, 0xD9, 0xE1
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})


def encoder(image_format: str, quality: int) -> Callable[[Image], bytes]:
    """A function from an image, uint8 ``[H, W, 3]``, to a file's bytes.

    JPEG is baseline and 4:4:4 with the accurate DCT: with no chroma to upsample, every decoder gives the same
    pixels.

    Raises:
        MissingExtraError: The codec is not installed.
    """
    if image_format == "png":
        require("PIL", extra="dali", feature="writing PNG shards")
        return _encode_png
    jpeg = require("simplejpeg", extra="dali", feature="writing JPEG shards")
    return functools.partial(
        jpeg.encode_jpeg, quality=quality, colorspace="RGB", colorsubsampling="444", fastdct=False
    )


def _encode_png(image: Image) -> bytes:
    from PIL import Image as pil

    buffer = io.BytesIO()
    # Level 1: a third of the time of the default for about a tenth more bytes.
    pil.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode(data: bytes, *, strict: bool = False) -> Image:
    """Decode a JPEG or PNG file to RGB, upright as its EXIF orientation says: uint8 ``[H, W, 3]``.

    Args:
        data: The file's bytes.
        strict: Also raise for damage that decoders paint over, such as missing entropy-coded data.

    Raises:
        ValueError: The bytes are no such image.
    """
    if data[:2] == b"\xff\xd8":
        jpeg = require("simplejpeg", extra="dali", feature="decoding JPEG shards")
        if _plain_jpeg(data):
            decoded: Image = jpeg.decode_jpeg(
                data, colorspace="RGB", fastdct=False, fastupsample=False, strict=strict
            )
            return decoded
    return _decode_pil(data)


def _plain_jpeg(data: bytes) -> bool:
    """Whether libjpeg's own colour conversion is enough: not CMYK, and no EXIF turn."""
    _, _, channels, exif = _jpeg_frame(data)
    return channels != 4 and (exif is None or _orientation(exif) == 1)


def _decode_pil(data: bytes) -> Image:
    require("PIL", extra="dali", feature="decoding PNG, CMYK and EXIF-rotated images")
    from PIL import Image as pil
    from PIL import ImageOps

    try:
        with pil.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            upright = ImageOps.exif_transpose(image)
            return np.asarray((upright if upright is not None else image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, zlib.error) as error:
        raise ValueError(f"cannot be decoded: {error}") from error


def measure(data: bytes) -> tuple[int, int]:
    """Height and width of the upright image, from headers alone.

    A JPEG must start with SOI, hold a frame and a scan, and end with EOI; a PNG's chunks must be whole, with
    their checksums, up to IEND.

    Raises:
        ValueError: It is no such image, or is visibly damaged; the message says how.
    """
    if not data:
        raise ValueError("has 0 bytes")
    if data[:8] == _PNG:
        return _measure_png(data)
    if data[:2] == b"\xff\xd8":
        height, width, _, exif = _jpeg_frame(data)
        if not data.rstrip(b"\0").endswith(b"\xff\xd9"):
            raise ValueError("JPEG has no end-of-image marker: it is truncated")
        return (width, height) if exif is not None and _orientation(exif) >= 5 else (height, width)
    raise ValueError(f"is neither JPEG nor PNG (it starts with {data[:4].hex()})")


def _jpeg_frame(data: bytes) -> tuple[int, int, int, bytes | None]:
    """Height, width, channels and the EXIF segment, walking marker segments up to the first scan."""
    position, frame, exif = 2, None, None
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise ValueError(f"JPEG has garbage where a marker should be (byte {position})")
        marker = data[position + 1]
        if marker == 0xFF or marker in _STANDALONE:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == _END_OF_IMAGE:
            break
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if length < 2 or len(body) != length - 2:
            raise ValueError(f"JPEG segment at byte {position} runs past the end: it is truncated")
        if marker in _START_OF_FRAME:
            if len(body) < 6:
                raise ValueError("JPEG frame header is too short")
            frame = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"), body[5]
        elif marker == _EXIF and body[:6] == b"Exif\0\0":
            exif = body[6:]
        elif marker == _START_OF_SCAN:
            if frame is None or min(frame) == 0:
                raise ValueError("JPEG scan comes before a frame with a size")
            return (*frame, exif)
        position += 2 + length
    raise ValueError("JPEG holds no scan: it is truncated")


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


def _measure_png(data: bytes) -> tuple[int, int]:
    position, size = 8, None
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind, end = data[position + 4 : position + 8], position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"PNG chunk {kind!r} at byte {position} fails its checksum")
        if kind == b"IHDR":
            size = (
                int.from_bytes(data[position + 8 : position + 12], "big"),
                int.from_bytes(data[position + 12 : position + 16], "big"),
            )
            if data[position + 16] == 16:
                raise ValueError("PNG has 16 bits a channel; only 8 are accepted")
        if kind == b"IEND":
            if size is None or min(size) == 0:
                raise ValueError("PNG has no size")
            return size[1], size[0]
        position = end + 4
    raise ValueError("PNG has no IEND chunk: it is truncated")
