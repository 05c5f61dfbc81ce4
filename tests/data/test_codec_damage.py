"""Damaged and hostile image files: both loaders take and refuse the same ones, at once, and none ends an epoch."""

from __future__ import annotations

import io
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdfast.data import ShardLoader, check_shards
from kdfast.data.codec import decode, measure
from tests.support.hostile import chunk, claims, mutations, png, repaired
from tests.support.shards import good, jpeg, label, pictures, tar


def encoded(mode: str, kind: str, size: int = 12, **options: object) -> bytes:
    pixels = pictures(1, size)[0].permute(1, 2, 0).numpy()
    image = (
        Image.fromarray(pixels[..., 0].astype(np.uint16))
        if mode == "I;16"
        else Image.fromarray(pixels).convert(mode)
    )
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded("RGB", kind, exif=exif)


def interlaced(depth: int, colours: int) -> bytes:
    """A PNG of 8 by 8 pixels in Adam7's seven passes, and of any depth: Pillow writes neither."""
    channels = {0: 1, 2: 3, 3: 1}[colours]
    passes = ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))  # pixels a line, lines
    rng = np.random.default_rng(depth)
    rows = [
        b"\0" + rng.bytes((wide * channels * depth + 7) // 8) for wide, lines in passes for _ in range(lines)
    ]
    head = chunk(b"IHDR", b"\0\0\0\x08\0\0\0\x08" + bytes([depth, colours, 0, 0, 1]))
    palette = chunk(b"PLTE", rng.bytes(3 << depth)) if colours == 3 else b""
    body = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + head + palette + body + chunk(b"IEND", b"")


#: Every kind of file that a shard may hold, by name.
FORMATS = {
    **{f"JPEG {mode}": encoded(mode, "JPEG") for mode in ("RGB", "L", "CMYK")},
    "JPEG progressive": encoded("RGB", "JPEG", progressive=True),
    **{f"JPEG {ratio}": encoded("RGB", "JPEG", subsampling=ratio) for ratio in ("4:4:4", "4:2:2")},
    "JPEG with restarts": encoded("RGB", "JPEG", restart_marker_blocks=1),
    "JPEG turned": turned("JPEG", 6),
    **{f"PNG {mode}": encoded(mode, "PNG") for mode in ("RGB", "L", "P", "RGBA", "LA", "1")},
    "PNG palette of 4 bits": encoded("P", "PNG", bits=4),
    "PNG transparent colour": encoded("RGB", "PNG", transparency=(1, 2, 3)),
    "PNG turned": turned("PNG", 6),
    "PNG interlaced": interlaced(8, 2),
    "PNG interlaced palette of 2 bits": interlaced(2, 3),
    "PNG interlaced grey of 4 bits": interlaced(4, 0),
    **{f"WebP {mode}": encoded(mode, "WEBP") for mode in ("RGB", "RGBA")},
    "WebP lossless": encoded("RGB", "WEBP", lossless=True),
    "WebP turned": turned("WEBP", 6),
}
SEEDS = list(FORMATS.values())
#: What is none of them, for both loaders to refuse.
OTHERS = {kind: encoded("RGB", kind) for kind in ("GIF", "BMP", "TIFF")} | {
    "PNG of 16 bits": encoded("I;16", "PNG")
}
BOMBS = {
    "png of 20000 squared": png(20_000, 20_000),
    "1-bit png of 15000 squared": png(15_000, 15_000, 1, 0),
    "png of 2^31": png(2**31 - 1, 2**31 - 1),
    "jpeg of 60000 squared": claims(jpeg(), 60_000, 60_000),
    "jpeg of 65500 squared": claims(jpeg(), 65_500, 65_500),
    "palette without PLTE": png(8, 8, 8, 3, data=bytes(72)),
    "short IHDR": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0\0\0\x08\0\0\0\x08") + chunk(b"IEND", b""),
    "empty IHDR": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"") + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
    "no IDAT": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", b"\0\0\0\x08\0\0\0\x08\x08\2\0\0\0")
    + chunk(b"IEND", b""),
    "colour type 5": png(8, 8, 8, 5),
    "depth 3": png(8, 8, 3, 0),
    "two IHDRs": png(8, 8, 8, 2, chunk(b"IHDR", b"\0\0\0\x08\0\0\0\x08\x08\2\0\0\0")),
    "no pixels in IDAT": png(8, 8),
}


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_no_file_ends_an_epoch(tmp_path: Path, loader: str) -> None:
    files = good(3)
    for number, data in enumerate(BOMBS.values()):
        kind = "jpg" if data[:2] == b"\xff\xd8" else "png"
        files += [(f"bad{number}.{kind}", data), (f"bad{number}.i32", label(0))]
    tar(tmp_path / "a.tar", files)
    started = time.monotonic()
    with ShardLoader(tmp_path, 4, image_size=16, on_error="skip", loader=loader) as reader:  # type: ignore[arg-type]
        seen = sum(len(labels) for _, labels in reader)
        left_out = {fault.key for fault in reader.quarantined}
    assert seen == 3
    assert left_out == {f"bad{number}" for number in range(len(BOMBS))}
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(case: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError):
        decode(BOMBS[case])
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    "tail", [b"\n", b"\0" * 7, b"SEFT trailer", jpeg(seed=1), b"\xff", b"x" * 5000], ids=lambda t: str(t[:8])
)
def test_what_cameras_write_behind_a_jpeg_does_not_matter(tmp_path: Path, tail: bytes) -> None:
    data = jpeg()
    assert measure(data + tail) == (16, 16)
    assert np.array_equal(decode(data + tail), decode(data))
    files = good(2)
    tar(tmp_path / "a.tar", [(n, d + tail if n == "001.jpg" else d) for n, d in files])
    for loader in ("dali", "torch"):
        with ShardLoader(tmp_path, 2, loader=loader) as reader:  # type: ignore[arg-type]
            assert sum(len(labels) for _, labels in reader) == 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_png_is_measured_as_it_is_turned(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4)).save(buffer, "PNG", exif=exif)
    assert measure(buffer.getvalue()) == decode(buffer.getvalue()).shape[:2]


def differences(folder: Path, kinds: list[str], count: int, seed: int) -> tuple[int, int, int, list[str]]:
    """Images given, those that pass the preflight, those that both loaders take, and those that only one takes."""
    seeds = [(FORMATS | OTHERS)[kind] for kind in kinds]
    images = [*seeds]  # as they are, too
    for number, data in enumerate(mutations(seeds, count, seed)):
        images.append(repaired(data) if number % 2 else data)
    files = []
    for number, data in enumerate(images):
        kind = "jpg" if data[:2] == b"\xff\xd8" else "png"
        files += [(f"{number:06d}.{kind}", data), (f"{number:06d}.i32", label(0))]
    tar(folder / "a.tar", [*good(1), *files])
    taken = {}
    for loader in ("dali", "torch"):
        with ShardLoader(folder, 16, image_size=16, shuffle=False, on_error="skip", loader=loader) as reader:  # type: ignore[arg-type]
            seen = sum(len(labels) for _, labels in reader)
            taken[loader] = set(reader._table.keys) - {fault.key for fault in reader.quarantined} - {"000"}
            assert seen == len(taken[loader]) + 1
    passed = len(check_shards(folder, on_error="skip")) - 1
    return len(images), passed, len(taken["dali"] & taken["torch"]), sorted(taken["dali"] ^ taken["torch"])


def test_both_loaders_take_the_same_files(tmp_path: Path) -> None:
    given, passed, both, odd = differences(tmp_path, [*FORMATS, *OTHERS], 200, 0)
    assert odd == []
    assert len(FORMATS) <= both <= passed < given


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FORMATS, *OTHERS])
def test_both_loaders_take_the_same_of_many_files(tmp_path: Path, kind: str) -> None:
    given, passed, both, odd = differences(tmp_path, [kind], 2000, 1)
    print(f"{kind}: {given} given, {passed} pass the preflight, {both} taken by both, {len(odd)} by one")
    assert odd == []
    assert bool(both) == (kind in FORMATS)
