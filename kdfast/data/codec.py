"""Encoding and decoding of one image, and what can be told of it without decoding."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kdfast.data.headers import MAX_FILE_BYTES, MAX_PIXELS, Header, extension, is_jpeg, read_header
from kdfast.errors import require

__all__ = [
    "EXTENSIONS", "FORMATS", "MAX_FILE_BYTES", "MAX_PIXELS", "Image", "ImageFormat", "decode", "encoder", "extension",
    "measure",
]  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable

Image = NDArray[np.uint8]

#: What is written.
ImageFormat = Literal["jpg", "png", "webp"]
FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
#: What is read, by the name's end.
EXTENSIONS = (*FORMATS, "jpeg")


def encoder(image_format: str, quality: int) -> Callable[[Image], bytes]:
    """A function from an image, uint8 ``[H, W, 3]``, to a file's bytes.

    JPEG is baseline and 4:4:4 with the accurate DCT: with no chroma to upsample, every decoder gives the same
    pixels. WebP has one decoder everywhere (libwebp); it is lossless at quality 100, and below it lossy and 4:2:0.

    Raises:
        MissingExtraError: The codec is not installed.
    """
    if image_format == "png":
        require("PIL", extra="dali", feature="writing PNG shards")
        return _encode_png
    if image_format == "webp":
        require("PIL", extra="dali", feature="writing WebP shards")
        return functools.partial(_encode_webp, quality=quality)
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


def _encode_webp(image: Image, quality: int) -> bytes:
    from PIL import Image as pil

    buffer = io.BytesIO()
    lossless = quality == 100
    # Of a lossless picture, the quality is the effort.
    pil.fromarray(image).save(
        buffer, "WEBP", lossless=lossless, quality=20 if lossless else quality, method=2
    )
    return buffer.getvalue()


def decode(data: bytes, *, strict: bool = False) -> Image:
    """Decode a JPEG, PNG or WebP file to RGB, upright as its EXIF orientation says: uint8 ``[H, W, 3]``.

    Args:
        data: The file's bytes.
        strict: Also raise for damage that decoders paint over, such as missing entropy-coded data.

    Raises:
        ValueError: The bytes are no such image, or one of more than :data:`MAX_PIXELS`; nothing is allocated for it.
    """
    header = read_header(data)
    if is_jpeg(data):
        jpeg = require("simplejpeg", extra="dali", feature="decoding JPEG shards")
        # libjpeg's own colour conversion is enough: not CMYK, and no EXIF turn.
        if header.channels != 4 and header.orientation == 1:
            decoded: Image = jpeg.decode_jpeg(
                data, colorspace="RGB", fastdct=False, fastupsample=False, strict=strict
            )
            return decoded
    return _decode_pil(data, header)


def _decode_pil(data: bytes, header: Header) -> Image:
    require("PIL", extra="dali", feature="decoding PNG, WebP, CMYK and EXIF-rotated images")
    from PIL import Image as pil
    from PIL import ImageOps

    try:
        with pil.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.size != (header.width, header.height):
                raise ValueError(f"its header says {header.width}x{header.height}, Pillow {image.size}")
            upright = ImageOps.exif_transpose(image)
            pixels = np.asarray((upright if upright is not None else image).convert("RGB"))
    except _PILLOWS as error:
        raise ValueError(f"cannot be decoded: {error}") from error
    if pixels.shape[:2] != header.upright:
        raise ValueError(f"cannot be decoded: its orientation is read as two things ({pixels.shape[:2]})")
    return pixels


#: What Pillow and its plugins raise on damaged files: SyntaxError for broken PNG chunks, struct.error and IndexError
#: for short ones. Not DecompressionBombError: the header has been looked at for its size before.
_PILLOWS = (
    OSError,
    SyntaxError,
    ValueError,
    zlib.error,
    struct.error,
    IndexError,
    KeyError,
    TypeError,
    EOFError,
)


def measure(data: bytes) -> tuple[int, int]:
    """Height and width of the upright image, from headers alone.

    A JPEG must start with SOI, hold a frame and a scan, and reach EOI (what cameras write behind it does not matter);
    a PNG's chunks must be whole, with their checksums, up to IEND, and hold what its colours need; a WebP must be one
    still picture, and as long as it says.

    Raises:
        ValueError: It is no such image, is visibly damaged, or has more than :data:`MAX_PIXELS`; the message says how.
    """
    return read_header(data).upright
