"""kdfast._C: the C++ tree, Philox and fixed point against Python integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support import replay_oracle as oracle

_C = pytest.importorskip("kdfast._C")

ALL = 2**32 - 1


def tree_of(masses: list[int]) -> _C.PriorityTree:
    tree = _C.PriorityTree(len(masses))
    tree.set(np.arange(len(masses)), np.array(masses, np.uint32))
    return tree


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        # Known answers of Random123 1.09 (kat_vectors, philox4x32 10).
        (0, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [ALL] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(key: int, counter: list[int], expected: list[int]) -> None:
    assert list(_C.philox(key, counter)) == expected
    assert list(oracle.philox(key, counter)) == expected


@settings(deadline=None, max_examples=50)
@example(delta=[0.0], alpha=0.015625, eps=0.0)
@given(
    delta=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    alpha=st.just(0.0) | st.floats(1e-6, 2),
    eps=st.sampled_from([0.0, 1e-6, 0.1]),
)
def test_fixed_point_is_the_formula(delta: list[float], alpha: float, eps: float) -> None:
    got = _C.quantise(np.array(delta, np.float32), alpha, eps, 2.0**22)
    for value, quantum in zip(delta, got.tolist(), strict=True):
        exact = oracle.quantum(value, alpha, eps, 2.0**22)
        # A tie of the exact power may fall either way: 2e-15 of the mass.
        assert abs(quantum - exact) <= math.ceil(2e-15 * exact)


def test_fixed_point_at_its_ends() -> None:
    ends = np.array([0.0, 1.0, -1.0, 1e30, 1e-40, 3.4e38], np.float32)
    assert _C.quantise(ends, 1.0, 0.0, 2.0**22).tolist() == [1, 2**22, 2**22, ALL, 1, ALL]
    assert _C.quantise(ends, 0.0, 0.0, 2.0**22).tolist() == [2**22] * 6
    assert _C.quantise(ends, 4.0, 0.0, 2.0**22).tolist() == [1, 2**22, 2**22, ALL, 1, ALL]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_prefix_search_brackets(data: st.DataObject) -> None:
    masses = data.draw(st.lists(st.sampled_from([0, 1, 5, 2**22, ALL]), min_size=1, max_size=600).filter(any))
    tree = tree_of(masses)
    targets = data.draw(st.lists(st.integers(0, sum(masses) - 1), min_size=1, max_size=50))
    found = tree.find(np.array(targets, np.uint64)).tolist()
    before = np.concatenate([[0], np.cumsum(np.array(masses, object))])
    for target, slot in zip(targets, found, strict=True):
        assert before[slot] <= target < before[slot + 1]
        assert masses[slot] > 0


@settings(deadline=None, max_examples=40)
@given(data=st.data(), capacity=st.sampled_from([1, 2, 255, 256, 257, 700, 66_000]))
def test_the_root_is_the_sum_after_any_mix_of_writes(data: st.DataObject, capacity: int) -> None:
    tree = _C.PriorityTree(capacity)
    write = st.tuples(st.integers(0, capacity - 1), st.sampled_from([0, 1, 77, 2**31, ALL]))
    for _ in range(data.draw(st.integers(1, 5))):
        writes = data.draw(st.lists(write, min_size=1, max_size=30))
        index, quantum = (np.array(column) for column in zip(*writes, strict=True))
        tree.set(index, quantum.astype(np.uint32))
        assert tree.total == int(tree.leaves.astype(object).sum())
        assert tree.consistent()


def test_batched_writes_and_searches_are_the_sequential_ones() -> None:
    rng = np.random.default_rng(0)
    one, many = _C.PriorityTree(1000), _C.PriorityTree(1000)
    index = rng.integers(0, 1000, 5000)
    quantum = rng.integers(0, 2**32, 5000, dtype=np.uint32)
    many.set(index, quantum)
    for k in range(5000):
        one.set(index[k : k + 1], quantum[k : k + 1])
    assert np.array_equal(one.leaves, many.leaves)
    assert np.array_equal(one.sums, many.sums)
    targets = rng.integers(0, one.total, 500, dtype=np.uint64)  # in no order, unlike stratified draws
    singly = [int(one.find(targets[k : k + 1])[0]) for k in range(500)]
    assert many.find(targets).tolist() == singly
    ordered = np.sort(targets)
    assert sorted(singly) == many.find(ordered).tolist()


def test_every_equal_item_of_ten_million_is_reached() -> None:
    """The float trees of others lose 6 % of the items here."""
    count = 10_000_000
    tree = _C.PriorityTree(count)
    mass = 2**22
    tree.set(np.arange(count), np.full(count, mass, np.uint32))
    everyone = np.arange(count, dtype=np.uint64) * mass
    assert np.array_equal(tree.find(everyone), np.arange(count))
    assert np.array_equal(tree.find(everyone + np.uint64(mass - 1)), np.arange(count))


@pytest.mark.parametrize("stratified", [True, False])
def test_draws_are_the_oracles(stratified: bool) -> None:
    rng = np.random.default_rng(1)
    masses = rng.integers(0, 2**32, 700).tolist()
    masses[100:400] = [0] * 300
    tree = tree_of(masses)
    targets = oracle.targets(sum(masses), 31, 99, 2**40 + 3, stratified)
    expected = [oracle.find(masses, target) for target in targets]
    assert tree.sample(31, seed=99, step=2**40 + 3, stratified=stratified).tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 63, 1000])
def test_more_draws_than_mass(count: int) -> None:
    """Strata narrower than a unit of mass still name a slot that exists, in proportion."""
    counts = np.bincount(tree_of([1, 2]).sample(count, seed=0), minlength=2)
    assert abs(counts[0] - count / 3) <= 2


@pytest.mark.slow
def test_a_hundred_thousand_random_writes_equal_a_rebuild() -> None:
    rng = np.random.default_rng(2)
    tree = _C.PriorityTree(200_000)
    for _ in range(100_000):
        tree.set(rng.integers(0, 200_000, 1), rng.integers(0, 2**32, 1, dtype=np.uint32))
    incremental = tree.sums
    tree.rebuild()
    assert np.array_equal(incremental, tree.sums)


def test_random_writes_equal_a_rebuild() -> None:
    rng = np.random.default_rng(2)
    tree = _C.PriorityTree(70_000)
    for _ in range(1000):
        tree.set(rng.integers(0, 70_000, 100), rng.integers(0, 2**32, 100, dtype=np.uint32))
    incremental = tree.sums
    tree.rebuild()
    assert np.array_equal(incremental, tree.sums)


def test_memory_beside_the_leaves_is_small() -> None:
    for capacity in (5000, 50_000, 1_000_000):
        assert _C.PriorityTree(capacity).nbytes <= 4 * capacity * 1.125


@pytest.mark.parametrize("capacity", [0, -1, 2**31 + 1])
def test_capacity_is_bounded(capacity: int) -> None:
    with pytest.raises(ValueError, match="capacity: got"):
        _C.PriorityTree(capacity)


@pytest.mark.parametrize("index", [-1, 5, 2**62])
def test_indices_are_checked_before_anything_is_written(index: int) -> None:
    tree = tree_of([1] * 5)
    with pytest.raises(ValueError, match=f"index: got {index}, accepted: 0 to 4"):
        tree.set(np.array([0, index]), np.array([9, 9], np.uint32))
    assert tree.leaves.tolist() == [1] * 5


def test_targets_beyond_the_total_are_refused() -> None:
    with pytest.raises(ValueError, match="targets: got 5"):
        tree_of([1] * 5).find(np.array([5], np.uint64))


def test_an_empty_tree_refuses_to_draw() -> None:
    with pytest.raises(ValueError, match="empty"):
        _C.PriorityTree(5).sample(1, seed=0)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="quantum: got 1 elements, accepted: 2"):
        _C.PriorityTree(5).set(np.array([0, 1]), np.array([1], np.uint32))


def test_slots_alone() -> None:
    slots = _C.RingSlots(3, "class_balanced", 2)
    assert slots.insert(3, np.array([0, 0, 1])).tolist() == [0, 1, 2]
    assert slots.insert(1, np.array([1])).tolist() == [0]  # the oldest of class 0
    assert slots.generation.tolist() == [3, 1, 2]
    slots.remove(np.array([1]))
    assert slots.live == 2
    assert slots.insert(2, np.array([0, 0])).tolist() == [1, 2]
    with pytest.raises(ValueError, match="eviction: got 'lifo'"):
        _C.RingSlots(3, "lifo")
    with pytest.raises(ValueError, match="labels: got 2 in row 0"):
        slots.insert(1, np.array([2]))
    with pytest.raises(ValueError, match="labels: got 1 elements, accepted: 2"):
        slots.insert(2, np.array([0]))


def test_the_histogram_alone() -> None:
    histogram = _C.ClassHistogram(3)
    histogram.add(np.array([0, 2, 2]))
    histogram.remove(np.array([2]))
    assert histogram.counts.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="labels: got 3, accepted: 0 to 2"):
        histogram.add(np.array([0, 3]))
    assert histogram.counts.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="num_classes: got 0"):
        _C.ClassHistogram(0)


def test_the_core_refuses_arrays_that_do_not_fit() -> None:
    arrays = {
        "leaves": np.zeros(4, np.int32),
        "sums": np.zeros(2, np.int64),
        "delta": np.zeros(4, np.float32),
        "generation": np.zeros(4, np.int32),
        "labels": np.zeros(4, np.int32),
        "meta": np.zeros(len(_C.META), np.int64),
        "class_counts": np.zeros(0, np.int64),
    }

    def core(**changed: object) -> object:
        return _C.ReplayCore(4, 0, 0, "fifo", 0.6, 1e-6, 2.0**22, False, {**arrays, **changed})

    core()
    with pytest.raises(ValueError, match="leaves: got 3 elements, accepted: 4"):
        core(leaves=np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="delta: must be a C-contiguous numpy array of float32"):
        core(delta=np.zeros(4))
    with pytest.raises(ValueError, match="leaves: must be"):
        core(leaves=np.zeros(8, np.int32)[::2])
    frozen = np.zeros(4, np.int32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="labels: is read-only"):
        core(labels=frozen)
