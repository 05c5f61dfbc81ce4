"""Bad shards: each kind is named under "raise", left out under "skip", and never reaches a decoder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kdfast.data.measures as measures_module
import kdfast.data.preflight as preflight_module
from kdfast.data import ShardError, ShardWriter, check_shards
from kdfast.data.codec import decode, measure
from tests.support.shards import good, jpeg, label, numbered, pictures, tar, write_numbered

Files = list[tuple[str, bytes]]


def replaced(name: str, data: bytes) -> Callable[[Files], Files]:
    return lambda files: [(n, data if n == name else d) for n, d in files]


def without(name: str) -> Callable[[Files], Files]:
    return lambda files: [(n, d) for n, d in files if n != name]


def png(flaw: str) -> bytes:
    import io

    buffer = io.BytesIO()
    if flaw == "16 bits":
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(buffer, "PNG")
        return buffer.getvalue()
    Image.fromarray(numbered(1)[0].permute(1, 2, 0).numpy()).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    if flaw == "flipped":
        data[data.index(b"IDAT") + 6] ^= 1
        return bytes(data)
    return bytes(data[:-12])


CORRUPT = jpeg()[:20] + b"\x00" * 8 + jpeg()[28:]

BAD_RECORDS = {
    "truncated jpeg": (replaced("001.jpg", jpeg()[:-200]), "no end-of-image marker: it is truncated"),
    "jpeg cut in its header": (replaced("001.jpg", jpeg()[:100]), "truncated"),
    "corrupt jpeg": (replaced("001.jpg", CORRUPT), "garbage where a marker should be"),
    "garbage jpeg": (replaced("001.jpg", b"not an image at all"), "is neither JPEG nor PNG"),
    "garbage between SOI and EOI": (
        replaced("001.jpg", b"\xff\xd8garbage\xff\xd9"),
        "garbage where a marker",
    ),
    "0-byte jpeg": (replaced("001.jpg", b""), "has 0 bytes"),
    "flipped png": (replaced("001.jpg", png("flipped")), "fails its checksum"),
    "truncated png": (replaced("001.jpg", png("short")), "no IEND chunk: it is truncated"),
    "16-bit png": (replaced("001.jpg", png("16 bits")), "16 bits a channel"),
    "missing label": (without("001.i32"), r"has no label \(.i32, or WebDataset's .cls\)"),
    "missing image": (without("001.jpg"), "has 0 images"),
    "short label": (replaced("001.i32", b"\1\0"), "its label has 2 bytes"),
    "negative label": (replaced("001.i32", label(-1)), r"label -1 is outside \[0, 2147483648\)"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_named_or_left_out(tmp_path: Path, case: str) -> None:
    spoil, message = BAD_RECORDS[case]
    tar(tmp_path / "a.tar", spoil(good(4)))
    with pytest.raises(ShardError, match=f"a.tar, key '001': .*{message}"):
        check_shards(tmp_path)
    table = check_shards(tmp_path, on_error="skip")
    assert table.keys == ["000", "002", "003"]
    assert [(fault.shard, fault.key) for fault in table.faults] == [("a.tar", "001")]


def test_a_label_beyond_the_manifests_classes(tmp_path: Path) -> None:
    write_numbered(tmp_path, 12, classes=10)
    document = json.loads((tmp_path / "manifest.json").read_text())
    document["num_classes"] = 9
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ShardError, match=r"key '000000009': label 9 is outside \[0, 9\)"):
        check_shards(tmp_path)
    assert len(check_shards(tmp_path, on_error="skip")) == 11


def test_duplicate_keys_keep_the_first(tmp_path: Path) -> None:
    files = good(3)
    tar(tmp_path / "a.tar", [*files, ("001.jpg", jpeg(seed=99)), ("001.i32", label(7))])
    with pytest.raises(ShardError, match="key '001': appears more than once"):
        check_shards(tmp_path)
    table = check_shards(tmp_path, on_error="skip")
    assert table.keys == ["000", "001", "002"]
    assert table.label.tolist() == [0, 1, 2]


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as stream:
        stream.truncate(size)


@pytest.mark.parametrize(
    "size, sound, message",
    [
        (300, 0, "cannot be read after byte 0"),
        (512 + 100, 0, "truncated inside '000.jpg'"),
        ("in the last image", 3, "truncated inside '003.jpg'"),
        ("in the last header", 3, "truncated"),
        ("between two records", 2, "no end-of-archive marker"),
        ("after the last record", 4, "no end-of-archive marker"),
    ],
)
def test_a_truncated_tar(tmp_path: Path, size: int | str, sound: int, message: str) -> None:
    path = tar(tmp_path / "a.tar", good(4))
    with tarfile.open(path) as archive:
        at = {member.name: member for member in archive}
    places = {
        "in the last image": at["003.jpg"].offset_data + 50,
        "in the last header": at["003.jpg"].offset + 50,
        "between two records": at["002.jpg"].offset,
        "after the last record": at["003.i32"].offset_data + 512,
    }
    cut(path, places[size] if isinstance(size, str) else size)
    with pytest.raises(ShardError, match=f"a.tar: .*{message}"):
        check_shards(tmp_path)
    if sound:
        assert len(check_shards(tmp_path, on_error="skip")) == sound
    else:
        with pytest.raises(ShardError, match="holds no usable images"):
            check_shards(tmp_path, on_error="skip")


def test_garbage_in_place_of_a_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", good(4))
    with tarfile.open(path) as archive:
        at = next(member.offset for member in archive if member.name == "002.jpg")
    with open(path, "r+b") as stream:
        stream.seek(at)
        stream.write(b"x" * 512)
    with pytest.raises(ShardError, match=f"a.tar: tar is garbled at byte {at}"):
        check_shards(tmp_path)
    assert len(check_shards(tmp_path, on_error="skip")) == 2


@pytest.mark.parametrize("content", [b"", bytes(10240), b"not a tar" * 1000])
def test_an_empty_or_senseless_shard(tmp_path: Path, content: bytes) -> None:
    tar(tmp_path / "a.tar", good(2))
    (tmp_path / "b.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"b\.tar"):
        check_shards(tmp_path)
    table = check_shards(tmp_path, on_error="skip")
    assert len(table) == 2
    assert {fault.shard for fault in table.faults} == {"b.tar"}


def test_a_changed_shard_is_refused_or_salvaged(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, samples_per_shard=4) as writer:
        writer.write(pictures(8), [0, 1, 2, 3] * 2)
    path = tmp_path / "shard-000001.tar"
    with tarfile.open(path) as archive:
        member = archive.getmember("000000005.jpg")
    with open(path, "r+b") as stream:
        # A marker in the middle of the entropy-coded data: headers are sound, pixels are not.
        stream.seek(member.offset_data + member.size // 2 + 150)
        stream.write(b"\xff\xd9" * 20)
    with pytest.raises(ShardError, match=r"shard-000001.tar: its SHA-256 is .* the manifest says"):
        check_shards(tmp_path)
    table = check_shards(tmp_path, on_error="skip")
    assert "000000005" not in table.keys
    assert len(table) == 7
    assert [fault.key for fault in table.faults] == ["", "000000005"]


def test_a_missing_shard(tmp_path: Path) -> None:
    write_numbered(tmp_path, 30)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001.tar: cannot be read: No such file"):
        check_shards(tmp_path)
    assert len(check_shards(tmp_path, on_error="skip")) == 20


def test_a_stale_index(tmp_path: Path) -> None:
    write_numbered(tmp_path, 20)
    shutil.copy(tmp_path / "shard-000000.idx", tmp_path / "shard-000001.idx")
    with pytest.raises(ShardError, match=r"shard-000001.tar: its index shard-000001.idx is stale"):
        check_shards(tmp_path)
    # The tar itself is sound, so nothing is lost.
    assert len(check_shards(tmp_path, on_error="skip")) == 20


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_pax_and_gnu_headers(tmp_path: Path, format: int) -> None:
    long = "a very long folder name " * 6
    files = [
        (f"{long}/{i}-é.{ext}", data) for i in range(3) for ext, data in (("jpg", jpeg()), ("i32", label(i)))
    ]
    tar(tmp_path / "a.tar", files, format=format)
    table = check_shards(tmp_path)
    assert table.keys == [f"{long}/{i}-é" for i in range(3)]
    assert table.label.tolist() == [0, 1, 2]
    with open(table.paths[0], "rb") as stream:
        stream.seek(table.offset[2])
        assert stream.read(int(table.size[2])) == jpeg()


def test_other_files_of_a_sample_do_not_matter(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", [*good(1), ("000.json", b"{}"), ("000.seg.png", b"x"), ("README", b"hello")])
    table = check_shards(tmp_path, on_error="skip")
    assert table.keys == ["000"]
    assert [fault.key for fault in table.faults] == ["README"]


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_cmyk_and_grey_decode_as_pillow_has_them(mode: str) -> None:
    import io

    data = jpeg(mode=mode)
    assert measure(data) == (16, 16)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int) -> None:
    import io

    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pictures(1, 16)[0, :, :, :8].permute(1, 2, 0).numpy()).save(buffer, "JPEG", exif=exif)
    data = buffer.getvalue()
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert measure(data) == upright.shape[:2] == ((8, 16) if orientation >= 5 else (16, 8))
    assert np.array_equal(decode(data), upright)


def test_every_way_of_cutting_a_jpeg_is_seen() -> None:
    data = jpeg()
    for length in range(len(data)):
        with pytest.raises(ValueError):
            measure(data[:length])


def test_measures_are_cached_by_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_numbered(tmp_path, 20)
    first = check_shards(tmp_path)
    looks: list[bytes] = []
    real = measures_module.measure
    monkeypatch.setattr(measures_module, "measure", lambda data: looks.append(data) or real(data))
    again = check_shards(tmp_path)
    assert not looks
    assert again.fingerprint == first.fingerprint
    assert again.keys == first.keys
    for cache in (tmp_path / ".preflight").iterdir():
        cache.write_text("{")
    assert check_shards(tmp_path).fingerprint == first.fingerprint
    assert len(looks) == 20


def test_a_cached_verdict_does_not_outlive_its_bytes(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", good(3))
    before = path.stat()
    assert len(check_shards(tmp_path)) == 3
    data = bytearray(path.read_bytes())
    data[512:520] = bytes(8)
    path.write_bytes(bytes(data))
    # The same size and time as before.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ShardError, match="key '000'"):
        check_shards(tmp_path)


def test_the_fingerprint_tells_sets_apart(tmp_path: Path) -> None:
    one, two = write_numbered(tmp_path / "one", 20), write_numbered(tmp_path / "two", 20, classes=9)
    assert check_shards(one).fingerprint != check_shards(two).fingerprint


@pytest.mark.parametrize("what", ["missing", "a file", "empty", "no shard"])
def test_refuses_what_is_no_set(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "set"
    message = {"missing": "is not a folder", "a file": "is not a folder"}.get(
        what, "holds neither a manifest.json"
    )
    if what == "a file":
        folder.write_text("")
    elif what == "empty":
        folder.mkdir()
    elif what == "no shard":
        ShardWriter(folder).close()
        message = "lists no finished shard"
    with pytest.raises(ShardError, match=message):
        check_shards(folder)


def test_the_index_file_is_what_wds2idx_writes(tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    with ShardWriter(tmp_path) as writer:
        writer.write(pictures(3), [0, 1, 2], [{"i": i} for i in range(3)])
    with wds2idx.IndexCreator(
        str(tmp_path / "shard-000000.tar"), str(tmp_path / "theirs"), verbose=False
    ) as creator:
        creator.create_index()
    theirs = (tmp_path / "theirs").read_text().split()
    assert (tmp_path / "shard-000000.idx").read_text().split() == theirs


def test_a_truncated_tar_does_not_end_the_interpreter(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", good(6))
    with tarfile.open(path) as archive:
        at = archive.getmember("004.jpg").offset_data
    cut(path, at + 100)
    code = textwrap.dedent(
        """
        import sys
        from kdfast.data import ShardError, ShardLoader
        try:
            ShardLoader(sys.argv[1], 2)
        except ShardError as error:
            print(error)
        loader = ShardLoader(sys.argv[1], 2, on_error="skip")
        print(sum(len(labels) for _, labels in loader), len(loader.quarantined))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert "a.tar: tar is truncated" in lines[0]
    assert lines[1] == "4 1"


def test_sha256_is_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(3_000_001))
    with open(path, "rb") as stream:
        assert preflight_module.sha256_of(stream) == hashlib.sha256(path.read_bytes()).hexdigest()
