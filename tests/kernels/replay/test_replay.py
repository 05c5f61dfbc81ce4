"""The replay family: kernels and C++ core against integer arithmetic in Python, and against each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import kdfast
from kdfast.ops import replay as ops
from kdfast.reference import replay as reference
from kdfast.reference.replay import Meta, PriorityRule, ReplayState, SumLayout
from tests.conftest import Target
from tests.support import replay_oracle as oracle
from tests.support.conformance import ConformanceSuite, OpCase

RULE = PriorityRule(alpha=0.6, eps=1e-6, scale=2.0**22)
SEED = 2**63 + 12345  # beyond int64, so that its bits must travel unchanged
BETA = 0.4


def make_state(
    capacity: int,
    shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    *,
    classes: int = 4,
    device: str = "cpu",
    eviction: Any = "fifo",
    rule: PriorityRule = RULE,
) -> ReplayState:
    return ReplayState.allocate(
        capacity,
        shape,
        dtype,
        classes,
        torch.device(device),
        seed=SEED,
        eviction=eviction,
        rule=rule,
        strict=False,
    )


def filled(delta: torch.Tensor, **options: Any) -> ReplayState:
    state = make_state(delta.numel(), device=str(delta.device), **options)
    rows = torch.arange(delta.numel(), dtype=torch.float32, device=delta.device)
    ops.add(state, rows, None, delta.float().contiguous())
    return state


def deltas(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {"delta": torch.randn(shape, generator=generator) * 3}


def run_sample(delta: torch.Tensor, stratified: bool = True) -> tuple[torch.Tensor, ...]:
    drawn = ops.sample(filled(delta), 9, BETA, stratified)
    return drawn.index.float(), drawn.samples, drawn.weight, drawn.probability


def oracle_sample(delta: torch.Tensor, stratified: bool = True) -> tuple[torch.Tensor, ...]:
    masses = [oracle.quantum(x, RULE.alpha, RULE.eps, RULE.scale) for x in delta.tolist()]
    slots = [oracle.find(masses, t) for t in oracle.targets(sum(masses), 9, SEED, 0, stratified)]
    index = torch.tensor(slots, dtype=torch.float64)
    weight = torch.tensor([oracle.weight(masses, slot, BETA) for slot in slots], dtype=torch.float64)
    probability = torch.tensor([masses[slot] / sum(masses) for slot in slots], dtype=torch.float64)
    return index, index, weight, probability


# Repeats, so that a slot's last write must win; infinities, which must change nothing (NaN: random_operations).
INDEX = [3, 0, 3, 2, 0, 3, 1]


def updates(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    fresh = torch.randn(len(INDEX), generator=generator) * 3
    fresh[4], fresh[6] = float("-inf"), float("inf")
    return {**deltas(generator, shape), "fresh": fresh}


def run_update(delta: torch.Tensor, fresh: torch.Tensor, largest: bool = False) -> tuple[torch.Tensor, ...]:
    state = filled(delta)
    index = torch.tensor(INDEX, device=delta.device)
    ops.update(state, index, fresh.float(), None, largest)
    # The root over what the leaves say it must be: exactly 1.
    leaves = state.leaves.double()
    return leaves / RULE.scale, state.delta, (state.sums[0].double() / leaves.sum()).reshape(1)


def oracle_update(
    delta: torch.Tensor, fresh: torch.Tensor, largest: bool = False
) -> tuple[torch.Tensor, ...]:
    expected = delta.abs()
    for slot in set(INDEX):
        named = [abs(float(f)) for i, f in zip(INDEX, fresh, strict=True) if i == slot and f.isfinite()]
        if named:
            expected[slot] = max(named) if largest else named[-1]
    masses = [oracle.quantum(x, RULE.alpha, RULE.eps, RULE.scale) for x in expected.tolist()]
    one = torch.ones(1, dtype=torch.float64)
    return torch.tensor(masses, dtype=torch.float64) / RULE.scale, expected, one


def sample_opcheck(inputs: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...]]:
    state = filled(inputs["delta"])
    args = (state.meta, state.leaves, state.sums, state.generation, state.labels, state.rows)
    return torch.ops.kdfast.replay_sample, (*args, 5, BETA, True, None, None)


def update_opcheck(inputs: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...]]:
    state = filled(inputs["delta"])
    index = torch.tensor(INDEX, device=state.device)
    fresh = torch.ones(len(INDEX), device=state.device)
    args = (state.meta, state.leaves, state.sums, state.delta, state.generation, index, fresh, None)
    return torch.ops.kdfast.replay_update, (*args, RULE.alpha, RULE.eps, RULE.scale, False)


def case(name: str, run: Any, expected: Any, make: Any, opcheck: Any, **options: Any) -> OpCase:
    return OpCase(
        name=name,
        make=make,
        run=lambda **kw: run(**kw, **options),
        oracle=lambda **kw: expected(**kw, **options),
        # 5: one node; 256, 257: a node's edge; 700: two levels; 66000: three.
        shapes=[(5,), (256,), (257,), (700,), (66_000,)],
        small_shapes=[(5,), (256,), (257,)],
        cast=("delta", "fresh"),
        # Priorities are float32 inside, so float64 input would be compared with what was never stored.
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        tolerances=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (2e-7, 0.0)),
        launches=2,  # the insert, and the call under test
        opcheck=opcheck,
    )


class TestConformance(ConformanceSuite):
    cases: ClassVar = [
        case("sample", run_sample, oracle_sample, deltas, sample_opcheck),
        case("independent", run_sample, oracle_sample, deltas, None, stratified=False),
        case("update", run_update, oracle_update, updates, update_opcheck),
        case("update_max", run_update, oracle_update, updates, None, largest=True),
    ]


# --- CPU = GPU, bit for bit ----------------------------------------------------------------------------------


class Twin:
    """The same calls on the target and on the C++ core."""

    def __init__(self, target: Target, *args: Any, **kwargs: Any) -> None:
        self.target = target
        self.here = make_state(*args, **kwargs, device=target.device)
        self.there = make_state(*args, **kwargs)

    def call(self, op: Any, *args: Any) -> Any:
        moved = [a.to(self.target.device) if isinstance(a, torch.Tensor) else a for a in args]
        with kdfast.use_backend(self.target.backend):  # type: ignore[arg-type]
            got = op(self.here, *moved)
        with kdfast.use_backend("reference"):
            expected = op(self.there, *args)
        if got is not None:
            pairs = (
                [(got, expected)] if isinstance(got, torch.Tensor) else list(zip(got, expected, strict=True))
            )
            for ours, theirs in pairs:
                assert torch.equal(ours.cpu(), theirs), op.__name__
        return expected

    def compare(self) -> None:
        for name in (*ReplayState.BOOKKEEPING, "rows"):
            assert torch.equal(getattr(self.here, name).cpu(), getattr(self.there, name)), name


def random_operations(
    twin: Twin, steps: int, batch: int, generator: torch.Generator, *, removals: bool = False
) -> int:
    """Inserts, draws and updates with bad values among them; returns how many rows were touched."""
    capacity, touched = twin.there.capacity, 0
    for step in range(steps):
        count = int(torch.randint(1, min(batch, capacity) + 1, (), generator=generator))
        noise = torch.randn(count, generator=generator).exp() * 4
        noise[noise > 20] = float("nan")
        kind = step % 4
        if kind == 0:
            rows = torch.randint(0, 256, (count, *twin.there.rows.shape[1:]), generator=generator)
            labels = torch.randint(0, 4, (count,), generator=generator)
            twin.call(ops.add, rows.to(twin.there.rows.dtype), labels, noise if step % 8 else None)
        else:
            drawn = twin.call(ops.sample, count, BETA, kind != 2)
            generation = drawn.generation + (noise > 8)  # some are stale
            twin.call(ops.update, drawn.index, noise, generation if kind == 3 else None, kind == 2)
        if removals and step % 5 == 3:
            twin.call(ops.remove, torch.randint(0, capacity, (count,), generator=generator))
            if not twin.there.live():
                twin.call(ops.add, torch.zeros(1, *twin.there.rows.shape[1:], dtype=twin.there.rows.dtype))
        touched += count
        assert int(twin.there.sums[0]) == int((twin.there.leaves.long() & 0xFFFFFFFF).sum())
    return touched


@pytest.mark.parametrize("capacity", [1, 40, 300])
def test_random_operations_are_bitwise_equal_to_the_core(
    target: Target, capacity: int, generator: torch.Generator
) -> None:
    twin = Twin(target, capacity, (3, 2), torch.uint8)
    random_operations(twin, 16, 40, generator)
    twin.compare()
    twin.call(ops.rebuild)
    twin.compare()


@pytest.mark.parametrize("eviction", ["fifo", "lowest", "class_balanced"])
@pytest.mark.parametrize("capacity", [1, 7, 300])
def test_with_removals_too(target: Target, capacity: int, eviction: str, generator: torch.Generator) -> None:
    twin = Twin(target, capacity, (3,), torch.uint8, eviction=eviction)
    random_operations(twin, 24, 40, generator, removals=True)
    twin.compare()


def test_rows_of_no_elements(target: Target, generator: torch.Generator) -> None:
    twin = Twin(target, 5, (0,), torch.uint8)
    random_operations(twin, 8, 4, generator)
    twin.compare()


def test_a_tree_without_rows_is_drawn_from_as_nothing(target: Target) -> None:
    """What a graph that is replayed after the last removal does, since it cannot refuse."""
    if target.backend == "reference":
        pytest.skip("the CPU raises")
    state = filled(torch.ones(4, device=target.device))
    ops.remove(state, torch.arange(4, device=target.device))
    drawn = ops.sample(state, 3, BETA)
    assert drawn.weight.tolist() == drawn.probability.tolist() == [0.0] * 3
    assert not state.filled


@pytest.mark.slow
def test_a_hundred_thousand_rows_of_random_operations(target: Target, generator: torch.Generator) -> None:
    twin = Twin(target, 70_000, (2,), torch.uint8)
    assert random_operations(twin, 800, 256, generator) > 100_000
    twin.compare()
    twin.call(ops.rebuild)
    twin.compare()


def test_three_levels_are_bitwise_equal_to_the_core(target: Target, generator: torch.Generator) -> None:
    twin = Twin(target, 70_000, (), torch.float32)
    random_operations(twin, 8, 40, generator)
    twin.compare()


@pytest.mark.parametrize("eviction", ["lowest", "class_balanced"])
def test_other_evictions_continue_after_kernels_wrote(
    target: Target, eviction: str, generator: torch.Generator
) -> None:
    twin = Twin(target, 20, (3,), torch.uint8, eviction=eviction)
    random_operations(twin, 16, 12, generator)
    twin.compare()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 4, 4), torch.uint8), ((5,), torch.uint8), ((7,), torch.bfloat16), ((2, 3), torch.float64), ((), torch.int64),
     ((5000,), torch.float32)],
    ids=str,
)  # fmt: skip
def test_rows_come_back_as_they_went_in(target: Target, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    twin = Twin(target, 6, shape, dtype)
    rows = (torch.rand(6, *shape) * 200).to(dtype)
    twin.call(ops.add, rows)
    drawn = twin.call(ops.sample, 8, BETA)
    assert torch.equal(drawn.samples, rows[drawn.index])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("side", [3, 60], ids=["fused", "own_launch"])
def test_normalised_rows_are_bitwise_equal_to_the_core(target: Target, dtype: torch.dtype, side: int) -> None:
    twin = Twin(target, 4, (3, side, side * 2), dtype)
    rows = (torch.rand(4, 3, side, side * 2) * 255).to(dtype)
    twin.call(ops.add, rows)
    gain, bias = torch.tensor([0.1, 0.02, 3.0]), torch.tensor([-1.0, 0.3, 0.0])
    moved = (gain.to(target.device), bias.to(target.device))
    with kdfast.use_backend(target.backend):  # type: ignore[arg-type]
        got = ops.sample(twin.here, 5, BETA, True, moved)
    with kdfast.use_backend("reference"):
        expected = ops.sample(twin.there, 5, BETA, True, (gain, bias))
    assert torch.equal(got.samples.cpu(), expected.samples)
    formula = rows[expected.index].double() * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)
    torch.testing.assert_close(expected.samples.double(), formula, rtol=1e-6, atol=1e-5)


def test_bad_indices_are_contained_where_raising_would_wait(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("the CPU raises: see test_replay_buffer.py")
    state = filled(torch.ones(4, device=target.device))
    before = state.leaves.clone()
    index = torch.tensor([-1, 4, 2**40], device=target.device)
    ops.update(state, index, torch.ones(3, device=target.device) * 9)
    assert torch.equal(state.leaves, before)
    assert int(state.meta[Meta.OUT_OF_RANGE]) == 3


def test_bad_labels_are_contained_where_raising_would_wait(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("the CPU raises: see test_replay_buffer.py")
    state = make_state(4, device=target.device)
    labels = torch.tensor([0, 4, -2], device=target.device)
    ops.add(state, torch.zeros(3, device=target.device), labels)
    assert state.labels.tolist() == [0, -1, -1, -1]
    assert state.class_counts.tolist() == [1, 0, 0, 0]
    assert int(state.meta[Meta.BAD_LABEL]) == 2


def test_updates_of_empty_slots_are_contained_where_raising_would_wait(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("the CPU raises: see test_replay_buffer.py")
    state = make_state(4, device=target.device)
    ops.add(state, torch.zeros(2, device=target.device))
    ops.update(state, torch.tensor([3], device=target.device), torch.ones(1, device=target.device))
    assert int(state.leaves[3]) == 0
    assert int(state.meta[Meta.EMPTY_SLOT]) == 1


def test_launches_of_a_training_step(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("no launches")
    from kdfast.kernels.launch import count_launches

    state = make_state(300, (3, 4, 4), torch.uint8, device=target.device)
    with count_launches() as insert:
        ops.add(state, torch.zeros(8, 3, 4, 4, dtype=torch.uint8, device=target.device))
    with count_launches() as step:
        drawn = ops.sample(state, 8, BETA)
        ops.update(state, drawn.index, drawn.weight, drawn.generation)
    assert dict(insert) == {"replay_add": 1}
    assert dict(step) == {"replay_sample": 1, "replay_update": 1}


def test_the_step_compiles_to_the_registered_ops(target: Target) -> None:
    """torch.compile traces sample and update without a graph break, and draws the same rows."""
    states = [filled(torch.arange(1.0, 41.0, device=target.device)) for _ in range(2)]

    def step(state: ReplayState) -> torch.Tensor:
        drawn = ops.sample(state, 8, BETA)
        ops.update(state, drawn.index, drawn.weight * 2, drawn.generation)
        return drawn.index

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(states[0]), step(states[1]))
    assert torch.equal(states[0].leaves, states[1].leaves)


# --- one truth about the layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 255, 256, 257, 65_536, 65_537, 2**24, 2**24 + 1, 2**31])
def test_the_sum_layout_is_the_cores(capacity: int) -> None:
    words, levels = reference.extension().sum_layout(capacity)
    layout = SumLayout.of(capacity)
    assert (layout.words, list(zip(layout.offsets, layout.counts, strict=True))) == (words, levels)


def test_the_meta_words_are_the_cores_and_the_kernels() -> None:
    words = {word.name: int(word) for word in Meta}
    assert words == reference.extension().META
    source = (Path(__file__).parents[3] / "kernels" / "replay" / "bodies.py").read_text()
    named = {name: int(value) for name, value in re.findall(r"^(\w+) = tl\.constexpr\((\d+)\)", source, re.M)}
    assert named == words


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("checked", [False, True])
def test_a_large_update_is_sorted_and_a_small_one_compared(
    largest: bool, checked: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either way the same rows win, whatever is not admitted between them: NaN, empty slots, no slots, stale rows."""
    if target.backend != "triton":
        pytest.skip("the reference has one way")
    from kdfast.kernels.replay import launch

    generator = torch.Generator().manual_seed(5)
    slots = torch.randint(-2, 14, (200,), generator=generator).to(target.device)
    scores = torch.randn(200, generator=generator).mul(2).round().to(target.device)  # many are equal
    scores[::17], scores[5::31] = float("nan"), float("inf")
    made = torch.randint(0, 2, (200,), generator=generator).to(target.device) if checked else None
    found, sorts, sorting = [], [], launch._beaten
    monkeypatch.setattr(launch, "_beaten", lambda *given: sorts.append(len(given[2])) or sorting(*given))
    assert launch.COMPARED <= 1 << 14  # a launch that compares more rows each with each takes seconds
    for limit in (199, 200):
        monkeypatch.setattr(launch, "COMPARED", limit)
        state = filled(torch.linspace(0, 3, 12, device=target.device))
        ops.update(
            state,
            slots,
            scores,
            None if made is None else state.generation[slots.clamp(0, 11)] + made,
            largest,
        )
        found.append([state.meta, state.leaves, state.sums, state.delta])
    assert sorts == [200]
    for sorted_, compared in zip(*found, strict=True):
        assert torch.equal(sorted_, compared)
