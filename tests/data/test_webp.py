"""WebP shards: smaller than JPEG, one decoder everywhere, and refused where they are not whole."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from kdfast.data import ShardLoader, ShardWriter, read_manifest
from kdfast.data.codec import decode, encoder, measure
from kdfast.data.headers import MAX_PIXELS
from tests.data.test_codec_damage import encoded
from tests.support.shards import good, label, pictures, tar

LOADERS = ("dali", "torch")


def piece(kind: bytes, body: bytes) -> bytes:
    """One chunk of a RIFF file."""
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def riff(*pieces: bytes) -> bytes:
    body = b"WEBP" + b"".join(pieces)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width: int, height: int, flags: int = 0) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return piece(b"VP8X", bytes([flags, 0, 0, 0]) + size)


def lossy(width: int, height: int, *, tag: int = 0x10, start: bytes = b"\x9d\x01\x2a") -> bytes:
    return piece(b"VP8 ", tag.to_bytes(3, "little") + start + struct.pack("<HH", width, height) + bytes(6))


def lossless(width: int, height: int, version: int = 0) -> bytes:
    bits = (width - 1) | (height - 1) << 14 | version << 29
    return piece(b"VP8L", b"\x2f" + struct.pack("<I", bits) + bytes(6))


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


WHOLE = encoded("RGB", "WEBP")


def smooth() -> torch.Tensor:
    """Pictures that lossy formats are for."""
    small = pictures(6, 8).float()
    return torch.nn.functional.interpolate(small, size=64, mode="bicubic").clamp(0, 255).byte()


REFUSED = {
    "cut short": (WHOLE[:-8], "it is truncated"),
    "says less than a chunk": (riff(WHOLE[12:])[:4] + struct.pack("<I", 20) + WHOLE[8:], "it is truncated"),
    "nothing in it": (riff(), "holds no picture"),
    "a canvas alone": (riff(canvas(8, 8)), "holds no picture"),
    "a canvas of another size": (riff(canvas(9, 8), WHOLE[12:]), "they must be of one size"),
    "a short canvas": (riff(piece(b"VP8X", b"\0" * 4), WHOLE[12:]), "has 4 bytes; it has 10"),
    "two pictures": (riff(WHOLE[12:], WHOLE[12:]), "a second picture"),
    "an animation": (animation(), "is an animation"),
    "no picture's start": (riff(lossy(8, 8, start=b"\0\0\0")), "does not begin as one does"),
    "between key frames": (riff(lossy(8, 8, tag=0x11)), "does not begin as one does"),
    "not shown": (riff(lossy(8, 8, tag=0)), "does not begin as one does"),
    "partition past the end": (riff(lossy(8, 8, tag=0x10 | 4000 << 5)), "shorter than it says"),
    "another version": (riff(lossless(8, 8, version=1)), "does not begin as one does"),
    "no width": (riff(lossy(0, 8)), "has no size"),
    "a lossy bomb": (riff(lossy(16383, 16383)), f"claims 16383x16383 pixels, accepted: at most {MAX_PIXELS}"),
    "a lossless bomb": (riff(lossless(16384, 16384)), "claims 16384x16384 pixels"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_whole_is_refused_before_it_is_decoded(case: str) -> None:
    data, why = REFUSED[case]
    for read in (measure, decode):
        with pytest.raises(ValueError, match=why):
            read(data)


@pytest.mark.parametrize("loader", LOADERS)
def test_none_of_them_ends_an_epoch(tmp_path: Path, loader: Any) -> None:
    files = good(3)
    for number, (data, _) in enumerate(REFUSED.values()):
        files += [(f"bad{number}.webp", data), (f"bad{number}.i32", label(0))]
    tar(tmp_path / "a.tar", files)
    with ShardLoader(tmp_path, 4, image_size=16, on_error="skip", loader=loader) as reader:
        assert sum(len(labels) for _, labels in reader) == 3
        assert {fault.key for fault in reader.quarantined} == {f"bad{n}" for n in range(len(REFUSED))}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_as_its_exif_says(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = pictures(1, 12)[0].permute(1, 2, 0).numpy()[:8]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, exif=exif)
    data = buffer.getvalue()
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert measure(data) == expected.shape[:2]
    assert np.array_equal(decode(data), expected)
    tar(tmp_path / "a.tar", [("0.webp", data), ("0.i32", label(3))])
    for loader in LOADERS:
        with ShardLoader(tmp_path, 1, mean=(0, 0, 0), std=(1, 1, 1), loader=loader) as reader:  # type: ignore[arg-type]
            ((images, labels),) = reader
        assert labels.tolist() == [3]
        shown = (images[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        assert np.array_equal(shown, expected)


def test_at_quality_100_every_bit_is_kept(tmp_path: Path) -> None:
    images = pictures(5, 24)
    with ShardWriter(tmp_path, image_format="webp", quality=100, samples_per_shard=3) as writer:
        writer.write(images, range(5))
    assert (read_manifest(tmp_path).image_format, read_manifest(tmp_path).quality) == ("webp", 100)
    for loader in LOADERS:
        with ShardLoader(tmp_path, 5, shuffle=False, mean=(0, 0, 0), std=(1, 1, 1), loader=loader) as reader:  # type: ignore[arg-type]
            ((shown, labels),) = reader
        assert labels.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal((shown * 255).round().to(torch.uint8), images)


def test_both_loaders_give_the_same_pixels_of_a_lossy_one(tmp_path: Path) -> None:
    images = smooth()
    with ShardWriter(tmp_path, image_format="webp", quality=80) as writer:
        writer.write(images, [0] * 6)
    shown = []
    for loader in LOADERS:
        with ShardLoader(tmp_path, 6, shuffle=False, mean=(0, 0, 0), std=(1, 1, 1), loader=loader) as reader:  # type: ignore[arg-type]
            shown.append((next(iter(reader))[0] * 255).round())
    assert torch.equal(*shown)
    assert (shown[0] - images).abs().mean() < 5


def test_files_are_smaller_than_jpegs() -> None:
    pixels = smooth().permute(0, 2, 3, 1).contiguous().numpy()
    sizes = {kind: sum(len(encoder(kind, 80)(one)) for one in pixels) for kind in ("webp", "jpg", "png")}
    assert sizes["webp"] < sizes["jpg"] < sizes["png"]


def test_a_set_goes_on_where_it_was_closed(tmp_path: Path) -> None:
    for start in (0, 3):
        with ShardWriter(tmp_path, image_format="webp", samples_per_shard=10, resume=True) as writer:
            assert writer.num_samples == start
            writer.write(pictures(3, 16, seed=start), [0, 1, 2])
            with pytest.raises(ValueError, match="of another format than this webp set"):
                writer.write([good(1)[0][1]], [0])
    assert read_manifest(tmp_path).num_samples == 6
