"""A buffer that threads share: nothing crashes, mixes or gets lost, and it ends as a plain model says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdfast import _C
from kdfast.replay import PrioritizedReplayBuffer
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the C++ core is what threads share")

THREADS = 8


def together(*works: Callable[[], None]) -> None:
    """Run all at once; the first error of any is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def until(seconds: float, work: Callable[[], None]) -> Callable[[], None]:
    def loop() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            work()

    return loop


def whole(state: dict[str, Any]) -> None:
    """Every row lies under its own label: row i of class c holds only the number c."""
    live = state["leaves"][: len(state["rows"])] != 0
    assert torch.equal(state["rows"][live][:, 0].long(), state["labels"][: len(live)][live].long())
    assert torch.equal(state["rows"][live].amin(1), state["rows"][live].amax(1))


@pytest.mark.parametrize("eviction", ["fifo", "lowest", "class_balanced"])
def test_what_is_read_is_of_one_moment(eviction: str, tmp_path: Path) -> None:
    """Eight threads: three insert, update and remove; five copy, save, restore and look."""
    options: dict[str, Any] = dict(dtype=torch.int32, num_classes=50, eviction=eviction)
    buffer = PrioritizedReplayBuffer(3000, (16,), **options)
    buffer.extend(torch.zeros(1, 16, dtype=torch.int32), [0])
    seconds = 1.0

    def insert() -> None:
        labels = torch.randint(0, 50, (200,))
        buffer.extend(labels.int().view(-1, 1).expand(-1, 16), labels)

    def rescore() -> None:
        batch = buffer.sample(64)
        assert torch.equal(batch.samples[:, 0].long(), batch.labels)
        buffer.update_priority(batch.index, torch.rand(64) * 9, batch.generation)

    def remove() -> None:
        buffer.remove(torch.randint(1000, 3000, (30,)))
        buffer.rebuild()

    def copy() -> None:
        state = buffer.state_dict()
        whole(state)
        PrioritizedReplayBuffer(3000, (16,), **options).load_state_dict(state)

    def save(name: str) -> Callable[[], None]:
        def work() -> None:
            buffer.save(tmp_path / name)
            whole(PrioritizedReplayBuffer.load(tmp_path / name).state_dict())

        return work

    def look() -> None:
        stats = buffer.stats()
        assert stats.size + stats.evicted <= stats.inserted
        assert 0 < int(buffer.class_counts().sum()) <= 3000
        assert len(buffer.top_k(10).index) <= 10
        assert 0 < len(buffer) <= 3000

    works = (insert, rescore, remove, copy, save("one"), save("one"), save("two"), look)
    assert len(works) == THREADS
    together(*(until(seconds, work) for work in works))
    whole(buffer.state_dict())
    assert buffer._state.core.consistent()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_state_is_replaced_at_once() -> None:
    """One thread puts back two states in turn; the others only ever see one of the two."""
    one, two = (PrioritizedReplayBuffer(20_000, (128,), dtype=torch.int32, num_classes=2) for _ in range(2))
    for label, buffer in enumerate((one, two)):
        buffer.extend(torch.full((20_000, 128), label, dtype=torch.int32), [label] * 20_000)
    states = [one.state_dict(), two.state_dict()]
    shared = PrioritizedReplayBuffer(20_000, (128,), dtype=torch.int32, num_classes=2)
    shared.load_state_dict(states[0])

    def put() -> None:
        for state in states:
            shared.load_state_dict(state)

    def see() -> None:
        batch = shared.sample(32)
        assert batch.samples.unique().numel() == batch.labels.unique().numel() == 1
        assert sorted(shared.class_counts().tolist()) == [0, 20_000]
        state = shared.state_dict()
        assert state["rows"].unique().numel() == state["labels"].unique().numel() == 1

    together(until(1.0, put), *(until(1.0, see) for _ in range(3)))


def test_threads_share_a_tree() -> None:
    tree = _C.PriorityTree(5000)
    tree.set(np.arange(5000), np.arange(1, 5001, dtype=np.uint32))

    def work() -> None:
        slots = tree.sample(int(np.random.default_rng().integers(100, 4000)), 7)
        assert slots.min() >= 0
        assert slots.max() < 5000
        tree.set(slots[:50], np.full(50, 9, np.uint32))
        assert int(tree.find(np.zeros(1, np.uint64))[0]) == 0
        assert len(tree.leaves) == 5000

    together(*[until(1.0, work)] * THREADS)
    assert tree.consistent()


class Worker:
    """A thread's own rows in a buffer that others fill too, and what they must be: slot → (row, label, |δ|)."""

    def __init__(self, buffer: PrioritizedReplayBuffer, number: int, most: int) -> None:
        self.buffer, self.most, self.model = buffer, most, {}
        self.rng = np.random.default_rng(number)
        self.operations = self.updates = self.inserted = self.removed = 0

    def step(self) -> None:
        rng, model, room = self.rng, self.model, self.most - len(self.model)
        if room and (not model or rng.random() < 0.4):
            count = int(rng.integers(1, min(room, 64) + 1))
            rows = rng.integers(0, 256, (count, 4), dtype=np.uint8)
            labels = rng.integers(0, 7, count)
            priority = rng.integers(1, 100, count).astype(np.float32)
            index = self.buffer.extend(torch.from_numpy(rows), labels.tolist(), priority.tolist())
            assert not model.keys() & set(index.tolist()), "a slot in use was given again"
            for at, slot in enumerate(index.tolist()):
                model[slot] = (rows[at].tolist(), int(labels[at]), float(priority[at]))
            self.inserted += count
        else:
            slots = rng.permutation(list(model))[: int(rng.integers(1, 65))]
            count = len(slots)
            if rng.random() < 0.3:
                self.buffer.remove(slots.tolist())
                for slot in slots.tolist():
                    del model[slot]
                self.removed += count
            else:
                priority = rng.integers(1, 100, count).astype(np.float32)
                self.buffer.update_priority(slots.tolist(), priority.tolist())
                for slot, value in zip(slots.tolist(), priority.tolist(), strict=True):
                    model[slot] = (*model[slot][:2], value)
        self.operations += count


def equal_to_a_model(eviction: str, operations: int) -> int:
    """Eight threads work on their own rows of one buffer: together they make what each alone would have made."""
    buffer = PrioritizedReplayBuffer(THREADS * 300, (4,), num_classes=7, eviction=eviction)  # type: ignore[arg-type]
    workers = [Worker(buffer, number, 300) for number in range(THREADS)]

    def work(worker: Worker) -> Callable[[], None]:
        def loop() -> None:
            while worker.operations < operations / THREADS:
                worker.step()

        return loop

    together(*(work(worker) for worker in workers))
    state, stats = buffer.state_dict(), buffer.stats()
    model = {slot: row for worker in workers for slot, row in worker.model.items()}
    assert sorted(model) == (state["leaves"] != 0).nonzero().flatten().tolist()
    for slot, (row, label, priority) in model.items():
        got = state["rows"][slot].tolist(), int(state["labels"][slot]), float(state["delta"][slot])
        assert got == (row, label, priority)
    assert stats.inserted == sum(worker.inserted for worker in workers)
    assert (stats.size, stats.evicted) == (len(model), 0)
    held = np.bincount([label for _, label, _ in model.values()], minlength=7)
    assert buffer.class_counts().tolist() == held.tolist()
    other = PrioritizedReplayBuffer(THREADS * 300, (4,), num_classes=7, eviction=eviction)  # type: ignore[arg-type]
    other.load_state_dict(state)  # checks leaves, sums and counts
    return sum(worker.operations for worker in workers)


@pytest.mark.parametrize("eviction", ["fifo", "lowest", "class_balanced"])
def test_threads_make_what_a_model_says(eviction: str) -> None:
    assert equal_to_a_model(eviction, 20_000) >= 20_000


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("eviction", ["fifo", "lowest", "class_balanced"])
def test_a_million_row_operations_of_threads(eviction: str) -> None:
    assert equal_to_a_model(eviction, 1_000_000) >= 1_000_000
