"""Shards on disk: what is in them, and that nothing which stops the writer spoils the set."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import kdfast.data.manifest as manifest_module
from kdfast.data import ShardError, ShardWriteError, ShardWriter, read_manifest
from tests.support.shards import checksums, good, numbered, pictures, tar, write_numbered


def names(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


def test_layout_of_a_set(tmp_path: Path) -> None:
    images, labels = pictures(5), torch.tensor([3, 1, 3, 0, 2])
    extra = [{"prompt": f"{i}"} for i in range(5)]
    with ShardWriter(tmp_path, samples_per_shard=3, num_classes=4, metadata={"seed": 7}) as writer:
        writer.write(images, labels, extra)
    assert names(tmp_path / "shard-000000.tar")[:3] == ["000000000.jpg", "000000000.i32", "000000000.json"]
    assert len(names(tmp_path / "shard-000001.tar")) == 6
    manifest = read_manifest(tmp_path)
    assert (manifest.num_samples, manifest.complete, manifest.metadata) == (5, True, {"seed": 7})
    assert manifest.class_counts == {0: 1, 1: 1, 2: 1, 3: 2}
    for shard in manifest.shards:
        data = (tmp_path / shard.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
    with tarfile.open(tmp_path / "shard-000001.tar") as archive:
        read = {member.name: archive.extractfile(member).read() for member in archive}
    assert np.frombuffer(read["000000003.i32"], "<i4").tolist() == [0]
    assert json.loads(read["000000004.json"]) == {"prompt": "4"}
    decoded = np.asarray(Image.open(io.BytesIO(read["000000003.jpg"]))).astype(int)
    assert np.abs(decoded - images[3].permute(1, 2, 0).numpy()).mean() < 3


def test_jpegs_are_baseline_444(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(pictures(1), [0])
    with tarfile.open(tmp_path / "shard-000000.tar") as archive:
        data = archive.extractfile("000000000.jpg").read()
    # SOF0 is baseline; then length 17, 8 bits, height, width, 3 channels, and each channel's sampling is 1x1.
    frame = data.index(b"\xff\xc0")
    assert data[frame + 2 : frame + 5] == b"\x00\x11\x08"
    assert [data[frame + at] for at in (11, 14, 17)] == [0x11] * 3


def test_png_is_lossless_and_order_is_kept(tmp_path: Path) -> None:
    write_numbered(tmp_path, 25)
    found = []
    for shard in read_manifest(tmp_path).shards:
        with tarfile.open(tmp_path / shard.file) as archive:
            for name in [n for n in archive.getnames() if n.endswith("png")]:
                found.append(np.asarray(Image.open(io.BytesIO(archive.extractfile(name).read()))))
    assert np.array_equal(np.stack(found), numbered(25).permute(0, 2, 3, 1).numpy())


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 50))
def test_shards_do_not_depend_on_how_images_arrive(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[int], per_shard: int
) -> None:
    total = sum(pieces)
    images, labels = numbered(total), torch.arange(total)
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    with ShardWriter(whole, samples_per_shard=per_shard, image_format="png") as writer:
        writer.write(images, labels)
    with ShardWriter(parts, samples_per_shard=per_shard, image_format="png") as writer:
        for part_images, part_labels in zip(images.split(pieces), labels.split(pieces)):
            writer.write(part_images, part_labels)
    assert checksums(whole) == checksums(parts)


def test_shuffle_seed_permutes_inside_a_shard_only(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, samples_per_shard=20, image_format="png", shuffle_seed=1) as writer:
        writer.write(numbered(40), torch.arange(40))
    first = [int(name[:9]) for name in names(tmp_path / "shard-000000.tar")[::2]]
    assert sorted(first) == list(range(20))
    assert first != sorted(first)


@pytest.mark.parametrize("shuffle_seed", [None, 5])
def test_a_closed_set_grows_as_if_it_had_never_been_closed(tmp_path: Path, shuffle_seed: int | None) -> None:
    images, labels = numbered(37), torch.arange(37)
    options = dict(samples_per_shard=10, image_format="png", shuffle_seed=shuffle_seed)
    with ShardWriter(tmp_path / "once", **options) as writer:
        writer.write(images, labels)
    with ShardWriter(tmp_path / "twice", **options) as writer:
        writer.write(images[:24], labels[:24])
    with ShardWriter(tmp_path / "twice", resume=True, **options) as writer:
        assert writer.num_samples == 24
        writer.write(images[24:], labels[24:])
    assert checksums(tmp_path / "once") == checksums(tmp_path / "twice")


def test_resuming_with_nothing_to_add_changes_nothing(tmp_path: Path) -> None:
    write_numbered(tmp_path, 24)
    before = checksums(tmp_path)
    with ShardWriter(
        tmp_path, samples_per_shard=10, image_format="png", num_classes=10, resume=True
    ) as writer:
        assert (writer.num_samples, writer.manifest.num_samples) == (24, 24)
    assert checksums(tmp_path) == before


WRITE = """
import os, sys, torch
from kdfast.data import ShardWriter
from tests.support.shards import numbered
images, labels = numbered(100), torch.arange(100)
with ShardWriter(sys.argv[1], samples_per_shard=10, image_format="png", resume=True) as writer:
    print(writer.num_samples, flush=True)
    for i in range(writer.num_samples, 100):
        writer.write(images[i:i + 1], labels[i:i + 1])
        if len(sys.argv) > 2 and i == int(sys.argv[2]):
            print("here", flush=True)
            sys.stdin.read()
"""


def test_kill_minus_nine_and_resume_give_the_same_set(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "undisturbed", samples_per_shard=10, image_format="png") as writer:
        writer.write(numbered(100), torch.arange(100))
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", textwrap.dedent(WRITE), str(killed)]
    with subprocess.Popen(
        [*command, "47"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout.readline() == "0\n"
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert read_manifest(killed).num_samples == 40
    assert not read_manifest(killed).complete
    # What a kill between two renames, or during a write, leaves behind.
    (killed / "shard-000004.tar").write_bytes(b"renamed, not entered")
    (killed / "shard-000005.tar.tmp").write_bytes(b"half")
    (killed / "shard-000011.idx.tmp").write_bytes(b"half, of a run with smaller shards")
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "40\n"
    assert checksums(killed) == checksums(tmp_path / "undisturbed")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("failing", ["shard-000001.idx", "shard-000001.tar", "manifest.json"])
def test_a_failing_disk_leaves_an_intact_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, code: int
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        # The manifest is written at the start and after each shard: fail for the second shard.
        due = failing != "manifest.json" or (tmp_path / "shard-000001.tar").exists()
        if name == f"{failing}.tmp" and due:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(manifest_module.os, "fsync", fsync)
    with (
        pytest.raises(OSError, match=os.strerror(code)) as caught,
        ShardWriter(tmp_path, samples_per_shard=10, image_format="png") as writer,
    ):
        writer.write(numbered(30), torch.arange(30))
    assert isinstance(caught.value, ShardWriteError)
    assert caught.value.errno == code
    assert failing.partition(".")[0] in str(caught.value)
    assert not list(tmp_path.glob("*.tmp"))
    manifest = read_manifest(tmp_path)
    assert (len(manifest.shards), manifest.complete) == (1, False)
    if failing != "manifest.json":
        assert not (tmp_path / "shard-000001.tar").exists()
    monkeypatch.undo()
    with ShardWriter(tmp_path, samples_per_shard=10, image_format="png", resume=True) as writer:
        assert writer.num_samples == 10
        writer.write(numbered(30)[10:], torch.arange(10, 30))
    assert read_manifest(tmp_path).num_samples == 30


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    # A file size limit is the only full disk that needs no root; Python sees the same short write and an
    # errno.
    code = textwrap.dedent(
        """
        import resource, signal, sys, torch
        from kdfast.data import ShardWriter, ShardWriteError
        from tests.support.shards import numbered
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with ShardWriter(sys.argv[1], samples_per_shard=10, image_format="png") as writer:
                writer.write(numbered(10), torch.arange(10))
                resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
                writer.write(numbered(10), torch.arange(10))
        except ShardWriteError as error:
            print(error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert "File too large" in done.stdout, done.stderr
    assert sorted(p.name for p in tmp_path.glob("*.tar*")) == ["shard-000000.tar"]
    assert read_manifest(tmp_path).num_samples == 10


def test_an_encoder_threads_exception_reaches_the_caller(tmp_path: Path) -> None:
    def broken(image: np.ndarray) -> bytes:
        raise RuntimeError("the encoder broke")

    def write() -> None:
        with ShardWriter(tmp_path, samples_per_shard=50) as writer:
            writer._encode = broken
            for _ in range(5):
                writer.write(pictures(10), torch.zeros(10, dtype=torch.long))

    with pytest.raises(RuntimeError, match="the encoder broke"):
        write()
    assert not list(tmp_path.glob("*.tar"))
    assert read_manifest(tmp_path).num_samples == 0


def test_an_exception_in_the_block_drops_the_shard_in_progress(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, samples_per_shard=10, image_format="png")

    def interrupted() -> None:
        with writer:
            writer.write(numbered(15), torch.arange(15))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    manifest = read_manifest(tmp_path)
    assert (manifest.num_samples, manifest.complete) == (10, False)
    with pytest.raises(ValueError, match="is closed"):
        writer.write(numbered(1), [0])


def test_refuses_a_set_that_is_already_there(tmp_path: Path) -> None:
    write_numbered(tmp_path, 12)
    with pytest.raises(ShardError, match=r"already holds 12 images in 2 shards; pass resume=True"):
        ShardWriter(tmp_path)
    # The refusal gave the lock back and touched nothing.
    assert read_manifest(tmp_path).complete


def test_refuses_to_resume_another_run_and_names_both(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, metadata={"seed": 1}, quality=90) as writer:
        writer.write(pictures(2), [0, 1])
    with pytest.raises(ShardError) as caught:
        ShardWriter(tmp_path, metadata={"seed": 2}, quality=95, resume=True)
    for part in ("another run", '"seed": 1', '"seed": 2', "quality is 90 there, 95 here"):
        assert part in str(caught.value)


def test_refuses_to_resume_when_a_shard_is_gone(tmp_path: Path) -> None:
    write_numbered(tmp_path, 20)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001.tar: is missing"):
        ShardWriter(tmp_path, samples_per_shard=10, image_format="png", num_classes=10, resume=True)


def test_refuses_a_folder_of_somebody_elses_tars(tmp_path: Path) -> None:
    tar(tmp_path / "laion-00.tar", good())
    with pytest.raises(ShardError, match=r"no known set \(laion-00.tar"):
        ShardWriter(tmp_path)


def test_refuses_a_second_writer(tmp_path: Path) -> None:
    with ShardWriter(tmp_path), pytest.raises(ShardError, match="another ShardWriter"):
        ShardWriter(tmp_path)
    ShardWriter(tmp_path).close()


@pytest.mark.parametrize(
    "images, labels, error, message",
    [
        (torch.zeros(2, 3, 8, 8), [0, 1], TypeError, "must be uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), [0], ValueError, r"must be \[N, 3, H, W\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1], ValueError, r"must be \[N, 3, H, W\]"),
        (numbered(2), [0], ValueError, "labels: got shape"),
        (numbered(2), [0.0, 1.0], TypeError, "must be integers"),
        (numbered(2), [0, 4], ValueError, r"label 4 at row 1 is outside \[0, 4\)"),
        (numbered(2), [-1, 0], ValueError, "label -1 at row 0"),
    ],
)
def test_refuses_bad_images_and_labels(
    tmp_path: Path, images: torch.Tensor, labels: list[int], error: type[Exception], message: str
) -> None:
    with ShardWriter(tmp_path, num_classes=4) as writer:
        with pytest.raises(error, match=message):
            writer.write(images, labels)
        # A refused call is no reason to lose the writer.
        writer.write(numbered(1), [0])
    assert read_manifest(tmp_path).num_samples == 1


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"image_format": "gif"}, ValueError, "image_format: got 'gif'; accepted: 'jpg', 'png', 'webp'"),
        ({"samples_per_shard": 0}, ValueError, "samples_per_shard: got 0"),
        ({"quality": 101}, ValueError, "quality: got 101"),
        ({"num_classes": 0}, ValueError, "num_classes: got 0"),
        ({"metadata": {"x": object()}}, TypeError, "metadata: must be JSON-able"),
    ],
)
def test_refuses_bad_options(tmp_path: Path, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ShardWriter(tmp_path, **options)


def test_extra_must_match_the_images(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path) as writer,
        pytest.raises(ValueError, match="extra: got 1 entries for 2 images"),
    ):
        writer.write(numbered(2), [0, 1], [{}])


def test_the_caller_may_reuse_its_buffer(tmp_path: Path) -> None:
    buffer = numbered(30)
    with ShardWriter(tmp_path / "reused", image_format="png") as writer:
        writer.write(buffer, torch.arange(30))
        buffer.zero_()
    with ShardWriter(tmp_path / "plain", image_format="png") as writer:
        writer.write(numbered(30), torch.arange(30))
    assert checksums(tmp_path / "reused") == checksums(tmp_path / "plain")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        ("[]", "is not a manifest"),
        ('{"format": "kdfast-shards", "version": 9}', "has version 9"),
        ('{"format": "kdfast-shards", "version": 1}', "is damaged"),
    ],
)
def test_damaged_manifests(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=message):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no manifest.json"):
        read_manifest(tmp_path)
