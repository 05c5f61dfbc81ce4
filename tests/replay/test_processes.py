"""A buffer and processes: forks while threads work, pickles, copies, and workers that draw for themselves."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kdfast.replay import PrioritizedReplayBuffer
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="processes share no interpreter")


def numbered(rows: int = 1000, **options: Any) -> PrioritizedReplayBuffer:
    buffer = PrioritizedReplayBuffer(rows, (), dtype=torch.float32, **options)
    buffer.extend(torch.arange(float(rows)))
    return buffer


def in_a_fork(buffer: PrioritizedReplayBuffer, seconds: float = 20) -> list[int]:
    """What a forked child draws; a child that hangs is killed and says so."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            buffer.extend(torch.zeros(3))
            drawn = buffer.sample(8, stratified=False).index.tolist()
            buffer.update_priority(drawn, torch.rand(8))
            whole = buffer._state.core.consistent() and len(buffer.state_dict()) > 1
            os.write(write, repr(drawn if whole else []).encode())
        finally:
            os._exit(0)
    os.close(write)
    end = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.005)
    with os.fdopen(read) as handle:
        return [int(x) for x in handle.read().strip("[]").split(",")]


def test_children_forked_while_threads_work_go_on() -> None:
    buffer = numbered(20_000)
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            batch = buffer.sample(4096)
            buffer.update_priority(batch.index, batch.weight, batch.generation)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        drawn = [tuple(in_a_fork(buffer)) for _ in range(20)]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert len(set(drawn)) == 20
    assert buffer._state.core.consistent()


def test_forked_children_draw_for_themselves_and_always_the_same() -> None:
    first = numbered(seed=5)
    drawn = [in_a_fork(first) for _ in range(3)]
    assert len({tuple(index) for index in drawn}) == 3
    again = numbered(seed=5)  # which counts the forks since it was made
    assert drawn == [in_a_fork(again) for _ in range(3)]
    untouched = numbered(seed=5)
    assert torch.equal(first.sample(8).index, untouched.sample(8).index)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_copy_goes_on_as_its_source(way: str, used: bool) -> None:
    source = numbered(num_classes=3, duplicates="max", beta=0.2)
    source.note = "kept"  # type: ignore[attr-defined]
    if used:
        batch = source.sample(50)
        source.update_priority(batch.index, torch.rand(50))
        source.remove([3, 4])
    twin = pickle.loads(pickle.dumps(source)) if way == "pickle" else copy.deepcopy(source)
    assert twin._config() == source._config()
    assert twin.note == "kept"
    for _ in range(2):
        assert torch.equal(twin.sample(32).index, source.sample(32).index)
        assert twin.extend(torch.ones(4)).tolist() == source.extend(torch.ones(4)).tolist()
    twin.extend(torch.zeros(900))
    assert len(source.state_dict()["rows"]) == 1000
    assert not torch.equal(twin.state_dict()["rows"], source.state_dict()["rows"])


class Sub(PrioritizedReplayBuffer):
    """Another signature."""

    def __init__(self, name: str) -> None:
        super().__init__(4, (2,))
        self.name = name


def test_subclasses_are_pickled() -> None:
    twin = pickle.loads(pickle.dumps(Sub("x")))
    assert (type(twin), twin.name, twin.capacity) == (Sub, "x", 4)


class Draws(torch.utils.data.IterableDataset[torch.Tensor]):
    def __init__(self, buffer: PrioritizedReplayBuffer) -> None:
        self.buffer = buffer

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(2):
            yield self.buffer.sample(16, stratified=False).index


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_draw_different_rows(context: str) -> None:
    buffer = numbered()
    buffer.sample(4)
    loader = torch.utils.data.DataLoader(
        Draws(buffer), batch_size=None, num_workers=2, multiprocessing_context=context
    )
    seen = [tuple(index.tolist()) for _ in range(2) for index in loader]
    assert len(set(seen)) == len(seen) == 8


def _send(buffer: PrioritizedReplayBuffer, queue: Any) -> None:
    queue.put(buffer.sample(8, stratified=False).index.tolist())


@pytest.mark.slow
def test_spawned_processes_draw_for_themselves() -> None:
    buffer = numbered()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    drawn = []
    for _ in range(2):
        process = context.Process(target=_send, args=(buffer, queue))
        process.start()
        drawn.append(queue.get(timeout=120))
        process.join()
    own = buffer.sample(8, stratified=False).index.tolist()
    assert len({tuple(index) for index in (*drawn, own)}) == 3
