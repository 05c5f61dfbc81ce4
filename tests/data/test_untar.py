"""Tars that someone else packed, or meant to hurt with: every file is there, or is spoken of."""

from __future__ import annotations

import io
import os
import resource
import tarfile
import time
from pathlib import Path

import pytest

from kdfast.data import ShardError, check_shards
from kdfast.data.untar import TarFault, members
from tests.support.hostile import END, base256, entry, header, padded, pax
from tests.support.shards import good, jpeg, label, tar


def walk(data: bytes) -> tuple[list[str], str]:
    """Names of the sound files, and what is wrong with the archive."""
    names = []
    try:
        for member in members(io.BytesIO(data)):
            names.append(member.name)
    except TarFault as fault:
        return names, str(fault)
    return names, ""


A = entry(b"a.i32", label(1))
HOSTILE = {
    "negative size": (A + header(b"b.jpg", base256(-512)) + END, "has a size of -512 bytes"),
    "negative size that goes back to the start": (
        A + header(b"b.jpg", base256(-1536)) + END,
        "has a size of -1536",
    ),
    "huge size": (A + header(b"b.jpg", base256(2**80)) + END, "bytes are missing"),
    "size beyond the file": (A + header(b"b.jpg", 4096) + END, "truncated inside 'b.jpg'"),
    "long name of 2^40 bytes": (
        A + header(b"././@LongLink", base256(2**40), b"L") + END,
        "claims 1099511627776",
    ),
    "long link of 2^70 bytes": (A + header(b"././@LongLink", base256(2**70), b"K") + END, "claims"),
    "negative long name": (A + header(b"././@LongLink", base256(-1), b"L") + END, "claims -1 bytes"),
    "extended header of 2^40 bytes": (A + header(b"x", base256(2**40), b"x") + END, "claims 1099511627776"),
    "global header of 8 GiB": (A + header(b"g", b"77777777777\0", b"g") + END, "claims 8589934591"),
    "extended header beyond the file": (A + header(b"x", 100_000, b"x") + END, "inside an extended header"),
    "size of 60,000 digits": (
        A + entry(b"x", pax((b"size", b"9" * 60_000)), b"x") + entry(b"b.jpg", b"1") + END,
        "says that a file has",
    ),
    "negative size in an extended header": (
        A + entry(b"x", pax((b"size", b"-5")), b"x") + entry(b"b.jpg", b"1") + END,
        "says that a file has",
    ),
    "record of no length": (
        A + entry(b"x", b"abc path=b\n", b"x") + entry(b"b.jpg", b"1") + END,
        "without a length",
    ),
    "record of a wrong length": (
        A + entry(b"x", b"99 path=b\n", b"x") + entry(b"b.jpg", b"1") + END,
        "a record that is garbled",
    ),
    "record of length 0": (A + entry(b"x", b"0 path=b\n", b"x") + entry(b"b.jpg", b"1") + END, "garbled"),
    "garbage behind the end": (A + END + b"x" * 4096, "4096 bytes behind its end"),
    "one byte behind the end": (A + END + b"x", "1 bytes behind its end"),
    "size that is no number": (A + header(b"b.jpg", b"0000000zzzz\0") + END, "garbled at byte 1024"),
    "gzip": (b"\x1f\x8b\x08" + bytes(range(256)) * 3, "it is compressed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_named_at_once(case: str) -> None:
    data, message = HOSTILE[case]
    started = time.monotonic()
    names, fault = walk(data)
    assert message in fault
    assert names == ([] if case == "gzip" else ["a.i32"])
    assert time.monotonic() - started < 1


def test_deeply_nested_extended_headers() -> None:
    nested = entry(b"x", pax((b"path", b"b.jpg")), b"x") * 5000 + entry(b"n", b"1")
    assert walk(A + nested + END) == (["a.i32", "b.jpg"], "")


def test_joined_archives_are_all_read(tmp_path: Path) -> None:
    one, two = tar(tmp_path / "one", good(6)[:6]), tar(tmp_path / "two", good(6)[6:])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(one.read_bytes() + two.read_bytes())
    assert check_shards(tmp_path / "set").keys == [f"{i:03d}" for i in range(6)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hard_links_are_the_files_that_they_link_to(tmp_path: Path, format: int) -> None:
    long = "folder/" * 12
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as archive:
        for name, data in ((f"{long}0.jpg", jpeg()), (f"{long}0.i32", label(3))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for extension in ("jpg", "i32"):
            info = tarfile.TarInfo(f"{long}1.{extension}")
            info.type, info.linkname = tarfile.LNKTYPE, f"{long}0.{extension}"
            archive.addfile(info)
    table = check_shards(tmp_path)
    assert table.keys == [f"{long}0", f"{long}1"]
    assert table.label.tolist() == [3, 3]
    assert table.offset[0] == table.offset[1]


@pytest.mark.parametrize(
    "kind, link, message",
    [
        (b"1", b"elsewhere.jpg", "is a link to 'elsewhere.jpg', which the archive does not hold"),
        (b"2", b"000.jpg", "is a symbolic link"),
        (b"3", b"", "is a device"),
        (b"6", b"", "is a pipe"),
        (b"S", b"", "is a sparse file"),
    ],
)
def test_what_has_no_bytes_of_its_own_is_named(
    tmp_path: Path, kind: bytes, link: bytes, message: str
) -> None:
    sound = entry(b"000.jpg", jpeg()) + entry(b"000.i32", label(0))
    (tmp_path / "a.tar").write_bytes(
        sound + header(b"001.jpg", 0, kind, link) + entry(b"001.i32", label(0)) + END
    )
    with pytest.raises(ShardError, match=rf"a.tar, key '001': its .jpg {message}"):
        check_shards(tmp_path)
    assert check_shards(tmp_path, on_error="skip").keys == ["000"]


def test_a_sparse_file_of_pax_is_named(tmp_path: Path) -> None:
    sparse = entry(b"x", pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")), b"x")
    body = sparse + entry(b"001.jpg", jpeg()) + entry(b"001.i32", label(0))
    (tmp_path / "a.tar").write_bytes(entry(b"000.jpg", jpeg()) + entry(b"000.i32", label(0)) + body + END)
    with pytest.raises(ShardError, match=r"key '001': its \.jpg is a sparse file"):
        check_shards(tmp_path)


def test_hidden_files_are_no_samples(tmp_path: Path) -> None:
    files = good(2)
    extra = [
        ("._000.jpg", b"finder"),
        (".DS_Store", b"x"),
        ("__MACOSX/a/000.jpg", b"x"),
        ("__MACOSX/._a.i32", b"x"),
    ]
    tar(tmp_path / "a.tar", [*extra, *files])
    assert check_shards(tmp_path).keys == ["000", "001"]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    body = entry(b"\xff\xfe.jpg", jpeg()) + entry(b"\xff\xfe.i32", label(5))
    (tmp_path / "a.tar").write_bytes(entry(b"000.jpg", jpeg()) + entry(b"000.i32", label(0)) + body + END)
    table = check_shards(tmp_path)
    assert table.keys == ["000", r"\xff\xfe"]
    assert table.label.tolist() == [0, 5]
    assert check_shards(tmp_path).keys == table.keys  # from what was kept


def test_everything_that_tarfile_reads_is_read_alike(tmp_path: Path) -> None:
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        with tarfile.open(path, "w", format=format) as archive:
            for i in range(40):
                name = f"{'d/' * (i % 7)}{'n' * (3 * i if format else i)}{i}.jpg"
                info = tarfile.TarInfo(name if format != tarfile.USTAR_FORMAT else name[-90:])
                info.size, info.mtime = 37 * i, 1.5 if format == tarfile.PAX_FORMAT else 1
                archive.addfile(info, io.BytesIO(os.urandom(info.size)))
        with tarfile.open(path) as archive:
            theirs = [(m.name, m.offset_data, m.size) for m in archive]
        with open(path, "rb") as stream:
            assert [(m.name, m.offset, m.size) for m in members(stream)] == theirs


def test_a_huge_claim_takes_no_memory() -> None:
    data = padded(A) + header(b"x", base256(2**33), b"x") + END
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    walk(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
