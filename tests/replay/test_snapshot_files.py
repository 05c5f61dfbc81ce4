"""Snapshot files: strangers' ones, temporaries, and 20,000 damaged ones."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdfast import _C
from kdfast.errors import CheckpointError, KDFastError
from kdfast.replay import PrioritizedReplayBuffer
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="no kernel is launched")


def used(eviction: Any = "fifo") -> PrioritizedReplayBuffer:
    buffer = PrioritizedReplayBuffer(6, (2, 2), num_classes=3, eviction=eviction, seed=11)
    buffer.extend(torch.arange(32, dtype=torch.uint8).view(8, 2, 2), [0, 1, 2, 0, 1, 2, 0, 1])
    buffer.update_priority([0, 3], [4.0, 0.25])
    buffer.sample(5)
    buffer.remove([2])
    return buffer


def sections(buffer: PrioritizedReplayBuffer) -> dict[str, bytes]:
    config = json.dumps({**buffer._config(), "used_slots": 6}).encode()
    tensors = {name: t for name, t in buffer.state_dict().items() if name != "config"}
    return {
        "config": config,
        **{n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()},
    }


def write(path: Path, parts: dict[str, bytes]) -> Path:
    _C.save_snapshot(str(path), [(name, np.frombuffer(data, np.uint8)) for name, data in parts.items()])
    return path


def with_config(parts: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    return {**parts, "config": json.dumps({**json.loads(parts["config"]), **changes}).encode()}


# --- strangers' files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity": 1 << 28},
        {"capacity": 1 << 31},
        {"sample_shape": [1 << 40], "used_slots": 0},
        {"sample_shape": [1 << 62] * 64, "used_slots": 0},
        {"sample_shape": [1] * 5000},
        {"num_classes": 1 << 31},
        {"used_slots": 1 << 40},
    ],
    ids=str,
)
def test_a_small_file_that_claims_much_costs_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    parts = sections(used())
    if changes.get("used_slots") == 0:
        parts["rows"] = b""
    path = write(tmp_path / "bomb", with_config(parts, **changes))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(CheckpointError, match="bomb: "):
        PrioritizedReplayBuffer.load(path)
    assert time.monotonic() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "sparse", sections(used()))
    os.truncate(path, 1 << 40)
    with pytest.raises(CheckpointError, match="truncated or extended"):
        PrioritizedReplayBuffer.load(path)
    head = bytearray(path.open("rb").read(24))
    head[16:24] = (1 << 40).to_bytes(8, "little")
    count = int.from_bytes(head[12:16], "little")
    with path.open("r+b") as handle:
        table = bytes(head) + handle.read(24 + 48 * count)[24:]
        handle.seek(0)
        handle.write(table + int(_C.crc64(np.frombuffer(table, np.uint8))).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="bytes after the last section"):
        PrioritizedReplayBuffer.load(path)


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError):
            PrioritizedReplayBuffer.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "config": b"[" * 100_000}, "nested too deeply"),
        (lambda p: {**p, "config": b"3"}, "settings are int"),
        (lambda p: {**p, "config": b"\xff"}, "no snapshot of a replay buffer"),
        (lambda p: {**p, "config": bytes(2 << 20)}, "at most 1048576 are read"),
        (lambda p: {**p, "more": b""}, "sections of"),
        (lambda p: with_config(p, dtype="float128"), "float128"),
        (lambda p: with_config(p, dtype=["uint8"]), "no snapshot of a replay buffer"),
        (lambda p: with_config(p, beta="0.4"), "beta: got '0.4'"),
        (lambda p: with_config(p, beta=float("nan")), "beta: got nan"),
        (lambda p: with_config(p, scale="1"), "scale: got '1'"),
        (lambda p: with_config(p, scale=float("nan")), "scale: got nan"),
        (lambda p: with_config(p, strict="no"), "strict: got 'no'"),
        (lambda p: with_config(p, seed=12), "seed is 12, the draws' is 11"),
        (lambda p: with_config(p, capacity=True), "capacity: got True"),
        (lambda p: with_config(p, eviction="class_balanced", num_classes=None), "sections of"),
    ],
)
def test_other_settings_are_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s", change(sections(used())))
    with pytest.raises(CheckpointError, match=message) as caught:
        PrioritizedReplayBuffer.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (5, 1 << 40, "largest priority"),
        (5, 0x7FC00000, "largest priority"),
        (5, -2, "largest priority"),
        (1, -1, "step is -1"),
        (10, -5, "saturated is -5"),
        (4, 2, "2 rows were inserted, 5 are held and 2 were evicted"),
        (7, 3, "a launch was under way"),
        (6, 3, "a launch was under way"),
    ],
)
def test_words_that_cannot_be_are_refused(word: int, value: int, message: str) -> None:
    state, buffer = used().state_dict(), used()
    state["meta"][word] = value
    with pytest.raises(CheckpointError, match=message):
        buffer.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("generation", 7, "two rows are of one insertion|has not been"),
        ("generation", 500, "an insertion that has not been"),
        ("labels", -7, "a label is negative"),
        ("delta", float("nan"), "negative or NaN"),
        ("delta", -1.0, "negative or NaN"),
    ],
)
def test_rows_that_cannot_be_are_refused(name: str, value: float, message: str) -> None:
    state, buffer = used().state_dict(), used()
    state[name][0] = value
    if name == "labels":
        state["class_counts"][0] -= 1
    with pytest.raises(CheckpointError, match=message):
        buffer.load_state_dict(state)


def test_a_section_may_be_there_once_only() -> None:
    twice = _C.encode_snapshot([("a", np.zeros(1, np.uint8)), ("a", np.zeros(1, np.uint8))])
    with pytest.raises(_C.SnapshotError, match="'a' is there twice"):
        _C.decode_snapshot(np.frombuffer(twice, np.uint8))


# --- writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["plain", "with space\n", b"\xff\xfe".decode(errors="surrogateescape"), "x" * 255]
)
def test_any_name_a_file_can_have(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for _ in range(2):
        used().save(path)
    assert os.listdir(tmp_path) == [name]
    assert len(PrioritizedReplayBuffer.load(path)) == 5
    with pytest.raises(OSError, match="nowhere"):
        used().save(tmp_path / "nowhere" / name)


def test_a_path_with_a_nul_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: got .*accepted: a path without NUL"):
        used().save(f"{tmp_path}/a\0b")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_leaves_is_swept_and_nothing_else(tmp_path: Path) -> None:
    path, code = (
        tmp_path / "buffer",
        """
import sys, torch
from kdfast.replay import PrioritizedReplayBuffer
buffer = PrioritizedReplayBuffer(200_000, (400,))
buffer.extend(torch.zeros(200_000, 400, dtype=torch.uint8))
print("ready", flush=True)
while True:
    buffer.save(sys.argv[1])
""",
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    end = time.monotonic() + 60
    while True:  # a stop may arrive between two saves: go on, and stop again
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # a sent signal is not yet a stopped process
        if list(tmp_path.glob("buffer.tmp-*")):
            break
        assert time.monotonic() < end
        process.send_signal(signal.SIGCONT)
        time.sleep(0.005)
    used().save(path)  # another's temporary, under way
    kept = list(tmp_path.glob("buffer.tmp-*"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(kept) == 1
    others = [
        "buffer.tmp-mine",
        "buffer.tmp-0123456789abcdef0",
        "other.tmp-0123456789abcdef",
        "buffer.tmp.77",
    ]
    for name in others:
        (tmp_path / name).write_text("not ours")
    used().save(path)
    assert sorted(os.listdir(tmp_path)) == sorted(["buffer", *others])
    assert len(PrioritizedReplayBuffer.load(path)) == 5


def test_a_link_under_the_temporary_s_name_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f"s.tmp.{os.getpid()}").symlink_to(victim)
    used().save(tmp_path / "s")
    assert victim.read_text() == "precious"


# --- fuzz ----------------------------------------------------------------------------------------------------


def mutated(parts: dict[str, bytes], rng: np.random.Generator) -> dict[str, bytes]:
    """A stranger's file whose checksums hold: bytes, lengths, words and settings changed."""
    out = dict(parts)
    for _ in range(int(rng.integers(1, 4))):
        name = str(rng.choice(list(out)))
        data = bytearray(out[name])
        kind = rng.integers(0, 6)
        if name == "config" and kind < 4:
            config = json.loads(parts["config"])
            values: list[Any] = [None, -1, 0, 1, 7, 1 << 31, 1 << 70, 0.5, float("nan"), float("inf"), "", "cuda", [],
                                 [2, 2], [0], [1 << 40], [-1], {}, True]  # fmt: skip
            config[str(rng.choice(list(config)))] = values[int(rng.integers(len(values)))]
            out[name] = json.dumps(config).encode()
        elif kind < 3 and data:
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
            out[name] = bytes(data)
        elif kind == 3 and len(data) >= 8:
            at = int(rng.integers(len(data) // 8)) * 8
            word = (0, 1, 255, 1 << 31, 1 << 62, (1 << 64) - 1)[int(rng.integers(6))]
            data[at : at + 8] = word.to_bytes(8, "little")
            out[name] = bytes(data)
        elif kind == 4:
            out[name] = bytes(data[: int(rng.integers(len(data) + 1))])
        elif len(out) > 1:
            del out[name]
    return out


def fuzz(count: int, path: Path) -> tuple[int, int]:
    """Files loaded and refused; anything else is raised."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = refused = 0
    parts = [sections(used(eviction)) for eviction in ("fifo", "lowest", "class_balanced")]
    for seed in range(count):
        rng = np.random.default_rng(seed)
        if seed % 2:
            write(path, mutated(parts[seed % 3], rng))
        else:
            raw = bytearray(write(path, parts[seed % 3]).read_bytes())
            for at in rng.integers(0, len(raw), int(rng.integers(1, 5))):
                raw[at] = int(rng.integers(256))
            path.write_bytes(raw[: int(rng.integers(len(raw) + 1)) if rng.random() < 0.2 else None])
        start = time.monotonic()
        try:
            buffer = PrioritizedReplayBuffer.load(path)
            buffer.stats(), buffer.top_k(2)
            buffer.extend(torch.zeros(2, *buffer.sample_shape, dtype=buffer.dtype))
            buffer.sample(3)
            buffer.remove([0])
            loaded += 1
        except CheckpointError:
            refused += 1
        assert time.monotonic() - start < 20, seed  # a machine may be busy; what hangs takes longer
    assert issubclass(CheckpointError, KDFastError)
    # A peak of its own, in KiB: what ran in this process before may have had more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20
    return loaded, refused


def test_damaged_files_load_or_are_refused(tmp_path: Path) -> None:
    loaded, refused = fuzz(600, tmp_path / "s")
    assert refused > 400
    assert loaded + refused == 600


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_thousand_damaged_files_load_or_are_refused(tmp_path: Path) -> None:
    loaded, refused = fuzz(20_000, tmp_path / "s")
    print(f"{loaded} loaded, {refused} refused")
    assert loaded + refused == 20_000
