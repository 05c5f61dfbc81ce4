"""What a set of shards says of itself is checked against its bytes, and opens nothing outside of its folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.data import ShardError, ShardLoader, ShardWriter, check_shards, read_manifest
from kdfast.data import manifest as manifest_module
from kdfast.data.manifest import JOURNAL
from kdfast.diffusion.parts import merge_parts, part_directory
from kdfast.errors import KDFastError
from tests.support.shards import checksums, numbered, write_numbered


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_shard(folder: Path, number: int = 0, **changes: Any) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[number] |= changes
    edit(folder, shards=shards)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def resumed(folder: Path, per_shard: int = 8) -> ShardWriter:
    return ShardWriter(folder, samples_per_shard=per_shard, image_format="png", num_classes=10, resume=True)


@pytest.mark.parametrize("part", ["label", "image", "header", "padding", "full shard"])
def test_resuming_does_not_vouch_for_what_has_changed(tmp_path: Path, part: str) -> None:
    write_numbered(tmp_path, 12, per_shard=8)
    path = tmp_path / ("shard-000000.tar" if part == "full shard" else "shard-000001.tar")
    data = path.read_bytes()
    at = data.index(b".i32")
    place = {
        "label": at // 512 * 512 + 512,
        "image": 600,
        "header": at + 100,
        "padding": at // 512 * 512 + 600,
    }
    flip(path, place.get(part, 600))
    with pytest.raises(ShardError, match=rf"{path.name}: its SHA-256 is not the manifest's"):
        resumed(tmp_path)
    with pytest.raises(ShardError, match="it was changed"):
        check_shards(tmp_path)


def test_one_flipped_label_stays_refused(tmp_path: Path) -> None:
    """The report's own steps: what the loader refused before resuming it refuses after."""
    write_numbered(tmp_path, 12, per_shard=8)
    path = tmp_path / "shard-000001.tar"
    flip(path, path.read_bytes().index(b"000000008.i32") + 512)
    with pytest.raises(ShardError), resumed(tmp_path) as writer:
        writer.write(numbered(4), torch.arange(4))
    with pytest.raises(ShardError, match="SHA-256"):
        ShardLoader(tmp_path, 4)


@pytest.mark.parametrize(
    "change", ["label", "height", "digit of an offset", "reason", "version", "deep", "type"]
)
def test_the_cache_is_believed_only_where_it_is_right(tmp_path: Path, change: str) -> None:
    write_numbered(tmp_path, 10, per_shard=10)
    expected = check_shards(tmp_path)
    (cache,) = (tmp_path / ".preflight").iterdir()
    text = cache.read_text()
    cache.write_text(
        {
            "label": text.replace(",1,8,8", ",7,8,8").replace("[8,8]", "[8,9]", 1),
            "height": text.replace("8", "9"),
            "digit of an offset": text.replace("512", "513"),
            "reason": text.replace("[8,8]", '"is no image"'),
            "version": text.replace('"version":2', '"version":1'),
            "deep": "[" * 100_000,
            "type": text.replace("[8,8]", "[8.0,true]"),
        }[change]
    )
    assert cache.read_text() != text
    found = check_shards(tmp_path)
    assert found.label.tolist() == expected.label.tolist()
    assert found.height.tolist() == expected.height.tolist()
    assert found.fingerprint == expected.fingerprint


def test_no_digit_of_the_cache_changes_what_is_read(tmp_path: Path) -> None:
    write_numbered(tmp_path, 6, per_shard=6)
    expected = check_shards(tmp_path)
    (cache,) = (tmp_path / ".preflight").iterdir()
    text = cache.read_text()
    chance = random.Random(0)
    for _ in range(60):
        at = chance.randrange(len(text))
        cache.write_text(text[:at] + chance.choice('0123456789[]{},"x') + text[at + 1 :])
        found = check_shards(tmp_path)
        assert (found.fingerprint, found.label.tolist()) == (expected.fingerprint, expected.label.tolist())


OUTSIDE = [
    "../secret/shard-000000.tar",
    "/etc/hostname",
    "shard-000000.tar\0",
    "sub/shard-000000.tar",
    "..",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("field", ["file", "index"])
def test_no_manifest_opens_a_file_outside_of_its_folder(tmp_path: Path, field: str, name: str) -> None:
    write_numbered(tmp_path / "secret", 10)
    write_numbered(tmp_path / "set", 10)
    edit_shard(tmp_path / "set", **{field: name})
    for use in (read_manifest, check_shards, lambda folder: resumed(folder, 10)):
        with pytest.raises(ShardError, match=f"shard 0: {field}: got .*accepted: shard-NUMBER"):
            use(tmp_path / "set")


def test_joining_parts_writes_nothing_outside(tmp_path: Path) -> None:
    victim = tmp_path / "victim.tar"
    victim.write_text("mine")
    part = part_directory(tmp_path / "set", 0, 10)
    write_numbered(part, 10)
    (part / "../../../victim.tar").resolve()
    edit_shard(part, file="../../victim.tar")
    with pytest.raises(ShardError, match="file: got"):
        merge_parts(tmp_path / "set", 10, 10, 1)
    assert victim.read_text() == "mine"


def test_a_link_laid_in_a_writers_way_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("manifest.json.tmp", "shard-000000.tar.tmp", "shard-000000.idx.tmp"):
        (folder / name).symlink_to(victim)
    write_numbered(folder, 10)
    assert victim.read_text() == "mine"
    assert len(check_shards(folder)) == 10


WRONG: list[dict[str, Any]] = [
    {"num_classes": "3"},
    {"num_classes": [3]},
    {"num_classes": 2.5},
    {"num_classes": 0},
    {"num_classes": -1},
    {"num_classes": True},
    {"num_classes": 10**400},
    {"samples_per_shard": 0},
    {"samples_per_shard": "8"},
    {"image_format": "gif"},
    {"image_format": ["png"]},
    {"quality": 101},
    {"quality": "best"},
    {"metadata": [1]},
    {"metadata": "x"},
    {"shards": {}},
    {"shards": [3]},
    {"shards": "x"},
    {"complete": 1},
    {"shuffle_seed": -1},
    {"shuffle_seed": 1.5},
    {"more": 1},
    {"version": [1]},
    {"format": ["kdfast-shards"]},
]


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_a_wrong_value_in_a_manifest_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_numbered(tmp_path, 10)
    edit(tmp_path, **changes)
    (name,) = changes
    field = {"more": "more", "format": "manifest", "shards": "shard"}.get(name, name)
    with pytest.raises(ShardError, match=field):
        read_manifest(tmp_path)


WRONG_SHARD: list[dict[str, Any]] = [
    {"file": 3},
    {"samples": "8"},
    {"samples": 0},
    {"samples": -1},
    {"samples": 11},
    {"bytes": 1.5},
    {"bytes": None},
    {"sha256": 3},
    {"sha256": ""},
    {"sha256": "x" * 64},
    {"class_counts": [1]},
    {"class_counts": {"x": 1}},
    {"class_counts": {"1": "x"}},
    {"class_counts": {"1": -1}},
    {"class_counts": {"²": 10}},
    {"class_counts": {"9" * 5000: 1}},
    {"more": 1},
]


@pytest.mark.parametrize("changes", WRONG_SHARD, ids=lambda changes: str(changes)[:40])
def test_a_wrong_value_of_a_shard_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_numbered(tmp_path, 10)
    edit_shard(tmp_path, **changes)
    (name,) = changes
    with pytest.raises(ShardError, match=f"shard 0: .*{name}"):
        read_manifest(tmp_path)


def test_a_shard_that_is_listed_twice(tmp_path: Path) -> None:
    write_numbered(tmp_path, 10)
    shards = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    edit(tmp_path, shards=shards * 2)
    with pytest.raises(ShardError, match=r"lists shard-000000\.tar 2 times"):
        check_shards(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samples": 9, "class_counts": {}}, "holds 10 images, the manifest says 9"),
        (
            {"class_counts": {"0": 2, **{str(k): 1 for k in range(2, 10)}}},
            "holds 1 images of class 0, the manifest says 2",
        ),
    ],
)
def test_a_manifest_that_contradicts_its_shard(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_numbered(tmp_path, 10)
    edit_shard(tmp_path, **changes)
    with pytest.raises(ShardError, match=message):
        check_shards(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deep"),
        ("[" * 80 + "]" * 80, "nested too deep"),
        ('{"format": "kdfast-shards", "format": "x"}', "key 'format' comes twice"),
        ('{"format": "\\ud800"}', "half of a character"),
        ("[" + "[]," * 5_000_000 + "1]", "lists and objects"),
        ("9" * 5000, "cannot be read"),
    ],
    ids=["open lists", "objects", "80 lists", "twice", "surrogate", "5 million lists", "digits"],
)
def test_json_bombs_are_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    started = time.monotonic()
    with pytest.raises(ShardError, match=message):
        read_manifest(tmp_path)
    assert time.monotonic() - started < 2


def test_a_pipe_or_a_folder_is_no_manifest_and_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(ShardError, match="is a pipe, not a file"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ShardError, match="is a folder, not a file"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").rmdir()
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ShardError, match="not a file"):
        check_shards(tmp_path)


@pytest.mark.parametrize(
    "state, message",
    [
        ({"epoch": "x"}, "epoch"),
        ({"epoch": None}, "epoch"),
        ({"epoch": -1}, "epoch"),
        ({"epoch": 1.5}, "epoch"),
        ({"epoch": True}, "epoch"),
        ({"batch": "0"}, "batch"),
        ({"batch": 99}, "batch"),
        ({"batch": 10**30}, "batch"),
        ({"dropped": "x"}, "dropped"),
        ({"dropped": [1.5]}, "dropped"),
        ({"dropped": [99]}, "dropped"),
        ({"dropped": None}, "dropped"),
        ({"dropped": [[]]}, "dropped"),
    ],
    ids=str,
)
def test_a_wrong_loader_state_is_named(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    with ShardLoader(write_numbered(tmp_path, 10), 4, loader="torch") as loader:
        whole = loader.state_dict()
        for wrong in (whole | state, {k: v for k, v in whole.items() if k not in state}):
            with pytest.raises(KDFastError, match=f"loader state: .*{message}"):
                loader.load_state_dict(wrong)
        for wrong in ([], None, "x"):
            with pytest.raises(KDFastError, match="loader state"):
                loader.load_state_dict(wrong)  # type: ignore[arg-type]


def test_another_process_is_named(tmp_path: Path) -> None:
    code = (
        "import sys, time; from kdfast.data import ShardWriter\n"
        "w = ShardWriter(sys.argv[1]); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(
            ShardError, match=rf"another ShardWriter is writing here: process {other.pid} on .*started"
        ):
            ShardWriter(tmp_path)
        other.kill()
    ShardWriter(tmp_path).close()  # the crash released it


def test_a_forked_child_does_not_keep_the_folder(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(5)
        os._exit(0)
    writer.close()
    ShardWriter(tmp_path).close()
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_many_shards_cost_no_square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = manifest_module.write_atomic
    monkeypatch.setattr(
        manifest_module,
        "write_atomic",
        lambda path, data, **k: (written.append(len(data)), real(path, data, **k)),
    )
    with ShardWriter(tmp_path, samples_per_shard=1, image_format="png", num_classes=10) as writer:
        writer.write(numbered(90, 2), torch.arange(90) % 10)
        assert (tmp_path / JOURNAL).exists()
        assert read_manifest(tmp_path).num_samples == 90
        assert len(written) < 70
    assert not (tmp_path / JOURNAL).exists()
    assert read_manifest(tmp_path).num_samples == 90


def test_a_journal_that_was_cut_short_costs_its_last_shard_only(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    for folder in (plain, tmp_path / "cut"):
        writer = ShardWriter(folder, samples_per_shard=1, image_format="png", num_classes=10)
        writer.write(numbered(68, 2), torch.arange(68) % 10)
        if folder == plain:
            writer.close()
            continue
        writer._release()  # as a crash does
        journal = folder / JOURNAL
        journal.write_bytes(journal.read_bytes()[:-20])
        assert read_manifest(folder).num_samples == 67
        with ShardWriter(
            folder, samples_per_shard=1, image_format="png", num_classes=10, resume=True
        ) as again:
            assert again.num_samples == 67
            again.write(numbered(68, 2)[67:], torch.arange(67, 68) % 10)
        assert checksums(folder) == checksums(plain)


@pytest.mark.parametrize("how", ["at the interpreter's end", "collected"])
def test_a_writer_that_nobody_closes_keeps_its_images_and_says_so(tmp_path: Path, how: str) -> None:
    code = (
        "import sys, torch; from kdfast.data import ShardWriter; from tests.support.shards import numbered\n"
        "w = ShardWriter(sys.argv[1], image_format='png', num_classes=10)\n"
        "w.write(numbered(50), torch.arange(50) % 10)\n" + ("del w\n" if how == "collected" else "")
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "was never closed; its last 50 images" in done.stderr
    manifest = read_manifest(tmp_path)
    assert (manifest.num_samples, manifest.complete) == (50, False)
    assert len(check_shards(tmp_path)) == 50


def test_two_readers_may_keep_what_they_measured_at_once(tmp_path: Path) -> None:
    write_numbered(tmp_path, 40)
    faults: list[BaseException] = []

    def read() -> None:
        try:
            check_shards(tmp_path)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert not list((tmp_path / ".preflight").glob(".tmp*"))
