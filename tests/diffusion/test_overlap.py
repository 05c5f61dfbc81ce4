"""Finishing in the background: order, bounded memory, and errors that reach the caller."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.data import ShardWriteError, read_manifest
from kdfast.diffusion.overlap import Background
from tests.diffusion.test_synthesizer import contents, synthesizer, tiny_dit, write


def test_items_are_done_in_order_and_all_of_them() -> None:
    done: list[int] = []
    with Background(done.append, depth=2) as background:
        for item in range(50):
            background.put(item)
    assert done == list(range(50))
    assert background.done == 50


def test_the_queue_is_bounded() -> None:
    gate, begun = threading.Event(), []

    def work(item: int) -> None:
        begun.append(item)
        gate.wait(10)

    with Background(work, depth=1) as background:
        background.put(0)
        background.put(1)  # waits in the queue
        third = threading.Thread(target=background.put, args=(2,))
        third.start()
        third.join(0.1)
        assert third.is_alive()
        gate.set()
        third.join(10)
    assert begun == [0, 1, 2]


def test_what_the_work_raises_reaches_the_caller_and_ends_it() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 1:
            raise ValueError("item 1")
        done.append(item)

    def feed() -> None:
        with Background(work) as background:
            for item in range(100):
                background.put(item)
                time.sleep(0.001)

    with pytest.raises(ValueError, match="item 1"):
        feed()
    assert done == [0]
    with pytest.raises(ValueError, match="item 1"), Background(work) as background:
        background.put(1)  # raised on leaving


def test_what_the_caller_raises_drops_what_waits() -> None:
    done: list[int] = []
    slow = threading.Event()

    def work(item: int) -> None:
        slow.wait(0.5)  # time enough for the caller, however busy the machine
        done.append(item)

    def feed() -> None:
        with Background(work, depth=5) as background:
            for item in range(4):
                background.put(item)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        feed()
    assert len(done) <= 1
    assert threading.active_count() < 20


def test_sampling_goes_on_while_a_batch_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, events = synthesizer(), []
    decode, draw = made._decode, made._latents
    sampled = threading.Semaphore(0)

    def slow_decode(latents: torch.Tensor) -> torch.Tensor:
        # The first batch is not finished before the second was sampled: only possible if they overlap.
        if not events.count("decoded"):
            assert sampled.acquire(timeout=20)
            assert sampled.acquire(timeout=20)
        events.append("decoded")
        return decode(latents)

    def count(*args: Any) -> torch.Tensor:
        result = draw(*args)
        sampled.release()
        return result

    monkeypatch.setattr(made, "_decode", slow_decode)
    monkeypatch.setattr(made, "_latents", count)
    write(made, tmp_path / "overlapped")
    monkeypatch.undo()
    write(made, tmp_path / "plain")
    assert contents(tmp_path / "overlapped") == contents(tmp_path / "plain")


def test_progress_counts_what_is_finished(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write(synthesizer(), tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    counts = [done for done, _ in seen]
    assert counts == sorted(counts)
    assert (seen[0], seen[-1]) == ((0, 23), (23, 23))


def test_a_full_disk_in_mid_set_stops_the_run_and_resuming_ends_in_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = synthesizer()
    write(made, tmp_path / "whole")
    from kdfast.data import writer

    real, written = writer.write_atomic, []

    def full(path: Path, *chunks: Any, **options: Any) -> None:
        written.append(path)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *chunks, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_atomic", full)
        with pytest.raises(ShardWriteError, match="No space left on device"):
            write(made, tmp_path / "full")
    assert read_manifest(tmp_path / "full").num_samples < 23
    write(made, tmp_path / "full", resume=True)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_an_error_while_sampling_leaves_only_whole_shards(tmp_path: Path) -> None:
    model = tiny_dit()
    made, calls = synthesizer(model), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))

    def stop(*_: Any) -> None:
        if len(calls) > 12:
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="out of memory"):
        write(made, tmp_path)
    manifest = read_manifest(tmp_path)
    assert not manifest.complete
    assert manifest.num_samples % 6 == 0
