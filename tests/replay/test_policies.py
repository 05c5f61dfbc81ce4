"""The replay buffer: who leaves, threads, refusals, modulation, CUDA graphs and streams."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

import kdfast
from kdfast.replay import PrioritizedReplayBuffer, modulation
from tests.conftest import INTERPRETING, Target
from tests.replay.test_buffer import make, small  # helpers

# --- who leaves ----------------------------------------------------------------------------------------------


class Model:
    """What the three policies mean, on a list of (slot, label, priority), oldest first."""

    def __init__(self, capacity: int, eviction: str) -> None:
        self.capacity, self.eviction, self.rows = capacity, eviction, []

    def victim(self) -> int:
        if self.eviction == "fifo":
            return 0
        if self.eviction == "lowest":
            return min(range(len(self.rows)), key=lambda at: (self.rows[at][2], at))
        labels = [label for _, label, _ in self.rows]
        return min(range(len(labels)), key=lambda at: (-labels.count(labels[at]), at))

    def insert(self, label: int, priority: float) -> int:
        free = sorted(set(range(self.capacity)) - {slot for slot, _, _ in self.rows})
        slot = free[0] if free else self.rows.pop(self.victim())[0]
        self.rows.append((slot, label, priority))
        return slot

    def update(self, slot: int, priority: float) -> None:
        self.rows = [(s, label, priority if s == slot else p) for s, label, p in self.rows]


@pytest.mark.parametrize("eviction", ["fifo", "lowest", "class_balanced"])
@pytest.mark.parametrize("capacity", [1, 7, 300])
def test_evictions_are_the_models(target: Target, eviction: str, capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    buffer = make(capacity, num_classes=5, eviction=eviction, device=target.device)
    model = Model(capacity, eviction)
    for step in range(small(8 if capacity > 100 else 40, 4)):
        count = int(rng.integers(1, capacity + 3))
        # Few classes and few priorities, so that ties are common.
        labels, priorities = rng.integers(0, 5, count), rng.integers(1, 4, count).astype(np.float32)
        index = buffer.extend(torch.arange(count) + 1000.0 * step, labels.tolist(), priorities.tolist())
        expected = [model.insert(int(x), float(p)) for x, p in zip(labels, priorities, strict=True)]
        assert index.tolist() == expected
        held = np.bincount([label for _, label, _ in model.rows], minlength=5)
        assert buffer.class_counts().tolist() == held.tolist()
        slots = rng.permutation([slot for slot, _, _ in model.rows])[: min(count, 20)]
        fresh = rng.integers(1, 4, len(slots)).astype(np.float32)
        buffer.update_priority(slots.tolist(), fresh.tolist())
        for slot, priority in zip(slots.tolist(), fresh.tolist(), strict=True):
            model.update(slot, priority)
        if step % 3 == 1:
            gone = rng.integers(0, capacity, int(rng.integers(1, capacity + 1))).tolist()
            buffer.remove(gone)
            model.rows = [row for row in model.rows if row[0] not in gone]
            assert len(buffer) == len(model.rows)
        if step % 5 == 4:  # what is restored goes on alike
            state = buffer.state_dict()
            buffer = make(capacity, num_classes=5, eviction=eviction, device=target.device)
            buffer.load_state_dict(state)
    kept = {slot: priority for slot, _, priority in model.rows}
    delta, leaves = buffer._state.delta.tolist(), buffer._state.leaves.tolist()
    assert {slot: delta[slot] for slot in range(capacity) if leaves[slot]} == kept


@pytest.mark.parametrize("eviction", ["fifo", "lowest", "class_balanced"])
def test_a_free_slot_is_used_before_a_row_leaves(target: Target, eviction: str) -> None:
    buffer = make(3, num_classes=1, eviction=eviction, device=target.device)
    buffer.extend(torch.arange(3.0), [0] * 3, [1.0, 2.0, 3.0])
    buffer.remove([2])
    assert buffer.extend(torch.tensor([9.0]), [0], [4.0]).tolist() == [2]
    assert buffer._state.rows.tolist() == [0, 1, 9]
    assert (len(buffer), buffer.stats().evicted) == (3, 0)
    buffer.remove([1])
    assert buffer.extend(torch.tensor([8.0]), [0], [5.0]).tolist() == [1]
    # Full again: the oldest leave, wherever they lie.
    assert buffer.extend(torch.tensor([7.0, 6.0]), [0, 0], [6.0, 7.0]).tolist() == [0, 2]


def _row_operations(eviction: str, operations: int) -> int:
    """A buffer and the plain model side by side, one row operation after another."""
    rng = np.random.default_rng(3)
    capacity = 60
    buffer, model = make(capacity, num_classes=5, eviction=eviction), Model(capacity, eviction)
    done = 0
    while done < operations:
        count = int(rng.integers(1, 80))
        labels, priorities = rng.integers(0, 5, count), rng.integers(1, 9, count).astype(np.float32)
        index = buffer.extend(torch.zeros(count), labels.tolist(), priorities.tolist())
        assert index.tolist() == [
            model.insert(int(label), float(p)) for label, p in zip(labels, priorities, strict=True)
        ]
        slots = rng.permutation([slot for slot, _, _ in model.rows])[:40]
        fresh = rng.integers(1, 9, len(slots)).astype(np.float32)
        buffer.update_priority(slots.tolist(), fresh.tolist())
        found = dict(zip(slots.tolist(), fresh.tolist(), strict=True))
        model.rows = [(slot, label, found.get(slot, p)) for slot, label, p in model.rows]
        gone = set(rng.integers(0, capacity, int(rng.integers(0, 20))).tolist())
        buffer.remove(sorted(gone))
        model.rows = [row for row in model.rows if row[0] not in gone]
        done += count + len(slots) + len(gone)
        if done % 7 == 0:
            assert len(buffer) == len(model.rows)
            held = np.bincount([label for _, label, _ in model.rows], minlength=5)
            assert buffer.class_counts().tolist() == held.tolist()
    return done


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("eviction", ["fifo", "lowest", "class_balanced"])
def test_a_million_row_operations_are_the_models(eviction: str) -> None:
    assert _row_operations(eviction, 1_000_000) >= 1_000_000


def test_class_balanced_eviction_levels_the_classes(target: Target) -> None:
    buffer = make(12, num_classes=3, eviction="class_balanced", device=target.device)
    buffer.extend(torch.zeros(12), [0] * 10 + [1, 2])
    buffer.extend(torch.zeros(6), [1, 2] * 3)
    assert buffer.class_counts().tolist() == [4, 4, 4]


@pytest.mark.parametrize("eviction", ["fifo", "lowest", "class_balanced"])
def test_bookkeeping_takes_at_most_24_bytes_a_slot(eviction: str) -> None:
    buffer = make(50_000, num_classes=10, eviction=eviction)
    assert buffer.nbytes <= 24 * 50_000


# --- threads -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETING, reason="the C++ core is what threads share")
def test_threads_share_a_buffer() -> None:
    buffer = make(500, num_classes=4, eviction="lowest")
    buffer.extend(torch.rand(500), torch.randint(0, 4, (500,)))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(150):
                batch = buffer.sample(64)
                buffer.update_priority(batch.index, torch.rand(64, generator=generator), batch.generation)
                buffer.extend(
                    torch.rand(8, generator=generator), torch.randint(0, 4, (8,), generator=generator)
                )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    state = buffer._state
    assert state.core.consistent()
    assert buffer.stats().draws == 600
    assert buffer.stats().inserted == 500 + 4 * 150 * 8
    assert buffer.class_counts().tolist() == state.labels.long().bincount(minlength=4).tolist()


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity: got 0, accepted: 1 to"),
        ({"capacity": 2.5}, TypeError, "capacity: got 2.5, accepted: an integer"),
        ({"capacity": True}, TypeError, "capacity: got True"),
        ({"sample_shape": (3, -1)}, ValueError, "sample_shape: got -1"),
        ({"dtype": torch.complex64}, TypeError, "dtype: got torch.complex64"),
        ({"num_classes": 0}, ValueError, "num_classes: got 0"),
        ({"alpha": -0.1}, ValueError, "alpha: got -0.1"),
        ({"alpha": math.nan}, ValueError, "alpha: got nan"),
        ({"alpha": "0.6"}, TypeError, "alpha: got '0.6'"),
        ({"beta": -1.0}, ValueError, "beta: got -1.0"),
        ({"eps": -1e-9}, ValueError, "eps: got"),
        ({"alpha": 1.0, "beta": 1.0}, ValueError, "product is 1; accepted: below 1"),
        ({"alpha": 2.0, "beta": 0.6}, ValueError, "product is 1.2; accepted: below 1"),
        ({"scale": 0.0}, ValueError, "scale: got 0.0"),
        ({"scale": "1"}, TypeError, "scale: got '1'"),
        ({"strict": 1}, TypeError, "strict: got 1"),
        ({"eviction": "class_balanced"}, ValueError, "eviction: got 'class_balanced' with num_classes=None"),
        ({"sample_shape": (1 << 40, 1 << 40)}, ValueError, "capacity, sample_shape: got 4 and"),
        ({"sample_shape": (1 << 50,)}, MemoryError, "capacity, sample_shape: got 4 and"),
        ({"eviction": "lifo"}, ValueError, "eviction: got 'lifo', accepted: fifo, lowest, class_balanced"),
        ({"duplicates": "first"}, ValueError, "duplicates: got 'first', accepted: last, max"),
        ({"seed": -1}, ValueError, "seed: got -1"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    settings = {"capacity": 4, "sample_shape": (), **options}
    with pytest.raises(kind, match=message.replace("(", r"\(")):
        PrioritizedReplayBuffer(**settings)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda b: b.extend([1.0]), TypeError, "samples: got list"),
        (lambda b: b.extend(torch.zeros(2, 3)), ValueError, r"samples: got shape \[2, 3\], accepted: \[n, 2\]"),
        (lambda b: b.extend(torch.zeros(2)), ValueError, "samples: got shape"),
        (lambda b: b.extend(torch.zeros(2, 2).double()), TypeError, "samples: got torch.float64"),
        (lambda b: b.extend(torch.zeros(2, 2), [0, 1, 1]), ValueError, r"labels: got shape \[3\], accepted: \[2\]"),
        (lambda b: b.extend(torch.zeros(2, 2), [0.5, 1.0]), TypeError, "labels: got torch.float32"),
        (lambda b: b.extend(torch.zeros(2, 2), [0, 4]), ValueError, "labels: got 4 in row 1, accepted: 0 to 3"),
        (lambda b: b.extend(torch.zeros(2, 2), [-1, 0]), ValueError, "labels: got -1 in row 0"),
        (lambda b: b.extend(torch.zeros(2, 2), None, [1.0]), ValueError, "priorities: got shape"),
        (lambda b: b.sample(0), ValueError, "batch_size: got 0"),
        (lambda b: b.sample(2.0), TypeError, "batch_size: got 2.0"),
        (lambda b: b.sample(2, beta=-1.0), ValueError, "beta: got -1.0"),
        (lambda b: b.sample(2, beta=5.0), ValueError, "product is 3; accepted: below 1"),
        (lambda b: b.sample(2, normalize=([1.0] * 3, 1.0)), ValueError, "normalize: got 3 values of mean"),
        (lambda b: b.sample(2, normalize=(0.0, 0.0)), ValueError, "normalize: got .* positive deviations"),
        (lambda b: b.update_priority([0, 1], [1.0]), ValueError, r"priority: got shape \[1\], accepted: \[2\]"),
        (lambda b: b.update_priority([0], [1.0], [1, 2]), ValueError, "generation: got shape"),
        (lambda b: b.update_priority([0.0], [1.0]), TypeError, "index: got torch.float32"),
        (lambda b: b.update_priority([0, 5], [1.0, 1.0]), ValueError, "index: got 5, accepted: 0 to 4"),
        (lambda b: b.update_priority([-1], [1.0]), ValueError, "index: got -1"),
        (lambda b: b.update_priority([0, 4], [1.0, 1.0]), ValueError, "index: got 4, which is an empty slot"),
        (lambda b: b.remove([9]), ValueError, "index: got 9"),
        (lambda b: b.top_k(-1), ValueError, "k: got -1"),
        (lambda b: b.set_nothing, AttributeError, "set_nothing"),
    ],
)  # fmt: skip
def test_bad_calls_change_nothing(call: Any, kind: type[Exception], message: str) -> None:
    if INTERPRETING:
        pytest.skip("kernels contain what the core raises: see test_replay.py")
    buffer = make(5, (2,), num_classes=4)
    buffer.extend(torch.ones(3, 2), [0, 1, 1])
    before = buffer.state_dict()
    with pytest.raises(kind, match=message):
        call(buffer)
    after = buffer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key != "config")


def test_an_empty_buffer_refuses_to_draw(target: Target) -> None:
    buffer = make(3, device=target.device)
    with pytest.raises(ValueError, match="the buffer is empty"):
        buffer.sample(1)
    buffer.extend(torch.zeros(0))
    with pytest.raises(ValueError, match="the buffer is empty"):
        buffer.sample(1)


def test_class_counts_need_classes() -> None:
    with pytest.raises(ValueError, match="num_classes=None"):
        make(3).class_counts()


def test_without_the_extension_the_error_says_what_to_do() -> None:
    code = """
import sys
sys.modules["kdfast._C"] = None
import kdfast
try:
    kdfast.replay
except kdfast.MissingExtraError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "kdfast._C" in said
    assert "C++17 compiler" in said
    assert "pip install" in said


# --- modulation ----------------------------------------------------------------------------------------------


def test_modulation_is_equation_3() -> None:
    prob = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    classes, counts = torch.tensor([0, 2, 2]), torch.tensor([6, 0, 3])
    phi = modulation(prob, classes, counts, 10, 2.0)
    expected = [0.4 * 0.1**2, 0.7 * 0.5**2, 0.7 * 0.8**2]
    torch.testing.assert_close(phi.detach(), torch.tensor(expected, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda p: modulation(p, classes, counts, 10, 2.0), prob)


def test_modulation_of_a_sure_teacher_has_finite_gradients() -> None:
    prob = torch.ones(2, requires_grad=True)
    phi = modulation(prob, torch.tensor([0, 1]), torch.tensor([1, 1]), 2, 0.5)
    torch.testing.assert_close(phi.detach(), torch.full((2,), 0.5 * 1e-6**0.5))
    phi.sum().backward()
    assert prob.grad is not None
    assert prob.grad.isfinite().all()


def test_modulation_with_an_empty_buffer_is_the_focal_term() -> None:
    prob, classes = torch.rand(2, 3, 3), torch.randint(0, 2, (2, 3, 3))
    for size in (0, torch.tensor(0)):
        phi = modulation(prob, classes, torch.zeros(2, dtype=torch.int64), size, 1.0)
        torch.testing.assert_close(phi, 1 - prob)


def test_modulation_takes_the_buffers_counts(target: Target) -> None:
    buffer = make(4, num_classes=2, device=target.device)
    buffer.extend(torch.zeros(4), [0, 0, 0, 1])
    prob = torch.tensor([0.5, 0.5], device=target.device)
    classes = torch.tensor([0, 1], device=target.device)
    phi = modulation(prob, classes, buffer.class_counts(), len(buffer), 1.0)
    assert phi.tolist() == [0.125, 0.375]


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        ((torch.tensor([1]), torch.tensor([0]), torch.tensor([1]), 1, 1.0), TypeError, "teacher_prob: got torch.int64"),
        ((torch.rand(1), torch.rand(1), torch.tensor([1]), 1, 1.0), TypeError, "teacher_class: got torch.float32"),
        ((torch.rand(2), torch.tensor([0]), torch.tensor([1]), 1, 1.0), ValueError, "teacher_class: got shape"),
        ((torch.rand(1), torch.tensor([0]), torch.tensor([[1]]), 1, 1.0), ValueError, "class_counts: got shape"),
        ((torch.rand(1), torch.tensor([0]), torch.tensor([1]), 1, -1.0), ValueError, "gamma: got -1.0"),
        ((torch.rand(1), torch.tensor([0]), torch.tensor([1]), -1, 1.0), ValueError, "size: got -1"),
        ((torch.rand(1), torch.tensor([3]), torch.tensor([1]), 1, 1.0), ValueError, "teacher_class: got 3"),
        ((torch.rand(1), torch.tensor([-1]), torch.tensor([1]), 1, 1.0), ValueError, "teacher_class: got -1"),
    ],
)  # fmt: skip
def test_modulation_refuses(args: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        modulation(*args)


def test_the_package_names_the_contract() -> None:
    assert kdfast.replay.PrioritizedReplayBuffer is PrioritizedReplayBuffer
