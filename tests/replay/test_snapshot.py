"""Snapshots of a replay buffer: what comes back, and that no damaged byte does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.errors import CheckpointError
from kdfast.replay import PrioritizedReplayBuffer
from tests.conftest import Target

_C = pytest.importorskip("kdfast._C")


def used(target: Target | None = None, eviction: Any = "fifo", **options: Any) -> PrioritizedReplayBuffer:
    """A buffer with a history: wrapped around, re-scored, with rows removed and values refused."""
    device = target.device if target else "cpu"
    buffer = PrioritizedReplayBuffer(
        6, (2, 2), num_classes=3, eviction=eviction, device=device, seed=7, **options
    )
    for start in (0, 4):
        images = torch.arange(16, dtype=torch.uint8).view(4, 2, 2) + start
        buffer.extend(images, [0, 1, 2, 1], [1.0, 2.0, float("nan"), 0.5])
    batch = buffer.sample(5)
    buffer.update_priority(batch.index, batch.weight * 3, batch.generation)
    buffer.remove([2])
    return buffer


def continues_alike(one: PrioritizedReplayBuffer, other: PrioritizedReplayBuffer) -> None:
    for step in range(4):
        first, second = one.sample(9, stratified=step % 2 == 0), other.sample(9, stratified=step % 2 == 0)
        for name, ours, theirs in zip(first._fields, first, second, strict=True):
            assert torch.equal(ours.cpu(), theirs.cpu()), name
        for buffer, batch in ((one, first), (other, second)):
            buffer.update_priority(batch.index, batch.weight * step, batch.generation)
            buffer.extend(batch.samples[:3], batch.labels[:3])
    assert one.stats() == other.stats()


@pytest.mark.parametrize("eviction", ["fifo", "lowest", "class_balanced"])
def test_a_restored_buffer_continues_with_the_same_draws(
    target: Target, eviction: str, tmp_path: Path
) -> None:
    source = used(target, eviction)
    path = tmp_path / "buffer.snapshot"
    source.save(path)
    from_dict = PrioritizedReplayBuffer(
        6,
        (2, 2),
        num_classes=3,
        eviction=eviction,
        device=target.device,  # type: ignore[arg-type]
    )
    from_dict.load_state_dict(source.state_dict())
    from_file = PrioritizedReplayBuffer.load(path, device=target.device)
    assert [p.name for p in tmp_path.iterdir()] == ["buffer.snapshot"]
    continues_alike(from_dict, from_file)
    again = PrioritizedReplayBuffer.load(path)
    continues_alike(source, again)


def test_settings_come_back(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(
        dtype=torch.bfloat16, num_classes=None, alpha=0.5, beta=0.3, eps=1e-3, eviction="lowest", seed=2**64 - 1,
        strict=True, scale=1024.0, duplicates="max",
    )  # fmt: skip
    buffer = PrioritizedReplayBuffer(3, (2,), **options)
    buffer.extend(torch.ones(2, 2, dtype=torch.bfloat16))
    buffer.save(tmp_path / "s")
    loaded = PrioritizedReplayBuffer.load(str(tmp_path / "s"))
    assert loaded._config() == buffer._config()
    assert torch.equal(loaded.sample(4).samples, buffer.sample(4).samples)


def test_an_empty_buffer_comes_back_empty(tmp_path: Path) -> None:
    PrioritizedReplayBuffer(3, (2,)).save(tmp_path / "s")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "s")
    assert len(loaded) == 0
    with pytest.raises(ValueError, match="empty"):
        loaded.sample(1)


def test_a_state_dict_shares_nothing_with_its_source(target: Target) -> None:
    source, copy = used(target), used(target)
    state = source.state_dict()
    kept = {key: value.clone() for key, value in state.items() if key != "config"}
    source.extend(torch.zeros(6, 2, 2, dtype=torch.uint8))
    source.sample(3)
    assert all(torch.equal(kept[key], state[key]) for key in kept)
    copy.load_state_dict(state)
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert torch.equal(copy.state_dict()["leaves"], kept["leaves"])


# --- damage --------------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path: Path) -> bytes:
    path = tmp_path / "whole"
    used().save(path)
    return path.read_bytes()


def decode(data: bytes) -> dict[str, Any]:
    out: dict[str, Any] = _C.decode_snapshot(np.frombuffer(data, np.uint8))
    return out


def test_every_flipped_byte_is_found(snapshot: bytes) -> None:
    assert decode(snapshot)
    for position in range(len(snapshot)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(snapshot)
            damaged[position] ^= flip
            with pytest.raises(_C.SnapshotError):
                decode(bytes(damaged))


def test_every_truncation_is_found(snapshot: bytes) -> None:
    for length in range(len(snapshot)):
        with pytest.raises(_C.SnapshotError):
            decode(snapshot[:length])
    with pytest.raises(_C.SnapshotError, match="truncated or extended"):
        decode(snapshot + b"\0")


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(_C.SnapshotError):
        decode(data)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_header_with_a_valid_checksum_is_not_trusted(data: st.DataObject) -> None:
    """Offsets, lengths and counts of an attacker who can compute a CRC."""
    count = data.draw(st.integers(0, 3))
    entries = b"".join(
        data.draw(st.binary(min_size=24, max_size=24))
        + b"".join(data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") for _ in range(3))
        for _ in range(count)
    )
    claimed = data.draw(st.sampled_from([count, count + 1, 1024, 2**32 - 1]))
    size = 24 + len(entries) + 8
    head = (
        b"KDFSNAP\0" + (1).to_bytes(4, "little") + claimed.to_bytes(4, "little") + size.to_bytes(8, "little")
    )
    body = head + entries
    crc = int(_C.crc64(np.frombuffer(body, np.uint8))).to_bytes(8, "little")
    if count or claimed != count:
        with pytest.raises(_C.SnapshotError):
            decode(body + crc)
    else:
        assert decode(body + crc) == {}


@settings(deadline=None, max_examples=50)
@given(sections=st.lists(st.binary(max_size=200), max_size=5))
def test_what_is_encoded_is_decoded(sections: list[bytes]) -> None:
    named = [(f"part{k}", np.frombuffer(data, np.uint8)) for k, data in enumerate(sections)]
    found = decode(_C.encode_snapshot(named))
    assert {name: bytes(data) for name, data in found.items()} == {name: bytes(data) for name, data in named}


def test_another_version_is_named(snapshot: bytes, tmp_path: Path) -> None:
    path = tmp_path / "newer"
    path.write_bytes(snapshot[:8] + (2).to_bytes(4, "little") + snapshot[12:])
    with pytest.raises(CheckpointError, match="snapshot version 2; this build reads version 1"):
        PrioritizedReplayBuffer.load(path)


def test_what_is_no_snapshot_is_said(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="f: not a replay snapshot"):
        PrioritizedReplayBuffer.load(path)
    with pytest.raises(CheckpointError, match="No such file"):
        PrioritizedReplayBuffer.load(tmp_path / "missing")
    _C.save_snapshot(str(path), [("other", np.zeros(3, np.uint8))])
    with pytest.raises(CheckpointError, match="no snapshot of a replay buffer"):
        PrioritizedReplayBuffer.load(path)


def test_section_names_are_bounded() -> None:
    for name in ("", "x" * 24):
        with pytest.raises(_C.SnapshotError, match="1 to 23 bytes"):
            _C.encode_snapshot([(name, np.zeros(1, np.uint8))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("config"), "has no 'config'"),
        (lambda s: s["config"].update(alpha=0.7), "alpha is 0.7, this buffer's is 0.6"),
        (lambda s: s["config"].update(capacity=7), "capacity is 7, this buffer's is 6"),
        (lambda s: s.pop("delta"), "'delta' is missing"),
        (lambda s: s.update(rows=s["rows"][:, :1]), "'rows' is torch.uint8"),
        (lambda s: s.update(rows=s["rows"][:2]), "rows are missing"),
        (lambda s: s.update(leaves=s["leaves"].long()), "'leaves' is torch.int64"),
        (lambda s: s["meta"][3].add_(1), "5 slots are filled, 6 are counted"),
        (lambda s: s["meta"][2].fill_(6), "the next slot is 6 of 6"),
        (lambda s: s["class_counts"][0].add_(1), "class counts are not those of the rows"),
        (lambda s: s["labels"][0].fill_(3), "a row has a class that does not exist"),
        (lambda s: s["leaves"][0].add_(1), "leaves are not those of the priorities"),
        (lambda s: s["sums"][0].add_(1), "sums are not those of the leaves"),
    ],
)
def test_inconsistent_states_are_refused_and_change_nothing(change: Any, message: str) -> None:
    state, buffer = used().state_dict(), used()
    change(state)
    before = buffer.state_dict()
    with pytest.raises(CheckpointError, match=message):
        buffer.load_state_dict(state)
    after = buffer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key != "config")


def test_a_write_that_fails_leaves_the_old_snapshot(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the write fails half way."""
    path = tmp_path / "buffer.snapshot"
    used().save(path)
    before = path.read_bytes()
    code = f"""
import resource, signal, torch
from kdfast.replay import PrioritizedReplayBuffer
buffer = PrioritizedReplayBuffer(4096, (64,))
buffer.extend(torch.zeros(4096, 64, dtype=torch.uint8))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    buffer.save({str(path)!r})
except OSError as error:
    print("refused:", error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "refused:" in said
    assert "cannot write" in said
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["buffer.snapshot"]


@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "buffer.snapshot"
    used().save(path)
    code = f"""
import torch
from kdfast.replay import PrioritizedReplayBuffer
buffer = PrioritizedReplayBuffer(40_000, (3072,))
buffer.extend(torch.zeros(40_000, 3072, dtype=torch.uint8))
print("ready", flush=True)
while True:
    buffer.save({str(tmp_path / "other")!r})
    buffer.save({str(path)!r})
"""
    for patience in (0.05, 0.4):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(patience)
        process.kill()
        process.wait()
        assert len(PrioritizedReplayBuffer.load(path)) in (5, 40_000)


def test_a_folder_that_does_not_exist_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        used().save(tmp_path / "nowhere" / "s")
