"""PrioritizedReplayBuffer: statistics, slots and evictions, and every refusal. On the target of the process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from kdfast.replay import PrioritizedReplayBuffer
from tests.conftest import INTERPRETING, Target


def make(capacity: int, shape: tuple[int, ...] = (), **options: Any) -> PrioritizedReplayBuffer:
    options.setdefault("dtype", torch.float32)
    return PrioritizedReplayBuffer(capacity, shape, **options)


def numbered(capacity: int, priorities: Any = None, **options: Any) -> PrioritizedReplayBuffer:
    """Row i holds the number i."""
    buffer = make(capacity, **options)
    buffer.extend(torch.arange(float(capacity)), priorities=priorities)
    return buffer


def small(full: int, tiny: int) -> int:
    return tiny if INTERPRETING else full


# --- the distribution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("count", [3, 40, 1000])
def test_independent_draws_follow_the_priorities(count: int, alpha: float) -> None:
    priorities = torch.linspace(0.1, 3, count)
    buffer = numbered(count, priorities, alpha=alpha, beta=0.0)
    draws = 200 * count
    drawn = torch.cat([buffer.sample(draws // 10, stratified=False).index for _ in range(10)])
    expected = (priorities.double() + 1e-6) ** alpha
    expected *= len(drawn) / expected.sum()
    observed = drawn.bincount(minlength=count).double()
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = count - 1
    # Wilson–Hilferty: (χ²/f)^(1/3) is normal; 4.5 standard deviations either way.
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(z) < 4.5


def test_stratified_counts_stay_within_two_of_their_expectation(target: Target) -> None:
    count, batch = small(500, 20), small(4096, 64)
    buffer = numbered(count, torch.rand(count) ** 4, device=target.device)
    drawn = buffer.sample(batch)
    mass = (buffer._state.leaves.long() & 0xFFFFFFFF).double().cpu()
    counts = drawn.index.cpu().bincount(minlength=count)
    assert float((counts - batch * mass / mass.sum()).abs().max()) <= 2


def test_the_weighted_mean_is_unbiased_at_beta_1() -> None:
    """E[w·x/N·N] = Σ x/N: weights undo the priorities."""
    buffer = numbered(200, torch.rand(200) + 0.05, beta=1.0)
    values = torch.randn(200, dtype=torch.float64)
    estimates = []
    for _ in range(200):
        batch = buffer.sample(500, stratified=False)
        estimates.append(float((batch.weight.double() * values[batch.index]).mean()))
    error = np.mean(estimates) - float(values.mean())
    assert abs(error) < 4.5 * np.std(estimates) / math.sqrt(len(estimates))


def test_probabilities_and_weights_are_the_papers(target: Target) -> None:
    priorities = torch.tensor([0.0, -0.5, 1.0, 7.0])
    buffer = numbered(4, priorities, device=target.device)
    batch = buffer.sample(8)
    mass = (priorities.double().abs() + 1e-6) ** 0.6
    probability = (mass / mass.sum())[batch.index.cpu()]
    torch.testing.assert_close(batch.probability.double().cpu(), probability, rtol=2e-6, atol=0)
    torch.testing.assert_close(batch.weight.double().cpu(), (4 * probability) ** -0.4, rtol=2e-6, atol=0)
    assert torch.equal(batch.samples, batch.index.float())


def test_probabilities_and_weights_of_all_rows_are_consistent() -> None:
    """Σ P = 1 and Σ P·w^(1/β) = 1."""
    buffer = numbered(50, torch.rand(50))
    batch = buffer.sample(20_000)
    found: dict[int, tuple[float, float]] = {}
    for index, probability, weight in zip(
        batch.index.tolist(), batch.probability.tolist(), batch.weight.tolist()
    ):
        found[index] = (probability, weight)
    assert len(found) == 50
    assert sum(p for p, _ in found.values()) == pytest.approx(1, abs=1e-6)
    assert sum(p * w ** (1 / 0.4) for p, w in found.values()) == pytest.approx(1, abs=1e-5)


def test_alpha_0_is_uniform_with_weights_of_one(target: Target) -> None:
    batch = numbered(7, torch.arange(7.0), alpha=0.0, eps=0.0, device=target.device).sample(14)
    assert batch.index.cpu().bincount(minlength=7).tolist() == [2] * 7
    assert batch.weight.tolist() == [1.0] * 14


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_all_zero_priorities_are_uniform(target: Target, eps: float) -> None:
    batch = numbered(6, torch.zeros(6), eps=eps, device=target.device).sample(12)
    assert batch.index.cpu().bincount(minlength=6).tolist() == [2] * 6
    assert batch.weight.tolist() == [1.0] * 12


def test_scaling_all_priorities_changes_nothing() -> None:
    priorities = torch.rand(64) + 0.01
    one, other = (numbered(64, priorities * c, eps=0.0).sample(512) for c in (1.0, 3.0))
    same = one.index == other.index
    assert same.float().mean() > 0.99
    torch.testing.assert_close(one.probability[same], other.probability[same], rtol=1e-4, atol=0)
    torch.testing.assert_close(one.weight[same], other.weight[same], rtol=1e-4, atol=0)


def test_priorities_times_weights_settle_at_the_derived_fixed_point() -> None:
    """Updating all rows with δ = w·KL ends at P ∝ KL^(α/(1+αβ))."""
    divergence = torch.linspace(0.2, 5, 20)
    buffer = numbered(20, divergence, eps=0.0)
    everyone = torch.arange(20)
    for _ in range(40):
        batch = buffer.sample(4000)
        weight = torch.empty(20)
        weight[batch.index] = batch.weight
        buffer.update_priority(everyone, weight * divergence)
    expected = divergence.double() ** (0.6 / (1 + 0.6 * 0.4))
    mass = buffer._state.leaves.double()
    torch.testing.assert_close(mass / mass.sum(), expected / expected.sum(), rtol=1e-4, atol=0)


def test_batch_larger_than_the_buffer(target: Target) -> None:
    batch = numbered(3, device=target.device).sample(30)
    assert batch.index.cpu().bincount().tolist() == [10] * 3


def test_a_buffer_of_one(target: Target) -> None:
    buffer = make(1, device=target.device)
    for value in (5.0, 6.0):
        assert buffer.extend(torch.tensor([value])).tolist() == [0]
        batch = buffer.sample(3)
        assert batch.samples.tolist() == [value] * 3
        assert batch.weight.tolist() == [1.0] * 3
        buffer.update_priority(batch.index, [0.1, 0.2, 0.3])
    assert len(buffer) == 1


def test_draws_depend_on_the_seed_and_the_call_alone(target: Target) -> None:
    a, b, c = (numbered(30, device=target.device, seed=seed) for seed in (1, 1, 2))
    first = a.sample(16, stratified=False).index
    assert torch.equal(first, b.sample(16, stratified=False).index)
    assert not torch.equal(first, c.sample(16, stratified=False).index)
    assert not torch.equal(first, a.sample(16, stratified=False).index)


def test_max_normalised_weights(target: Target) -> None:
    buffer, again = (numbered(5, torch.arange(1.0, 6.0), device=target.device) for _ in range(2))
    raw, normalised = buffer.sample(20).weight, again.sample(20, max_normalize=True).weight
    torch.testing.assert_close(normalised, raw / raw.max(), rtol=0, atol=0)


# --- rows in, rows out ---------------------------------------------------------------------------------------


def test_wraparound_keeps_the_newest_rows(target: Target) -> None:
    buffer = make(5, num_classes=3, device=target.device)
    first = buffer.extend(torch.arange(3.0), [0, 1, 2])
    second = buffer.extend(torch.arange(3.0, 7.0), [2, 2, 0, 0])
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [3, 4, 0, 1]
    assert buffer._state.rows.tolist() == [5, 6, 2, 3, 4]
    assert buffer.class_counts().tolist() == [2, 0, 3]
    assert len(buffer) == 5
    assert buffer.stats().evicted == 2


def test_more_rows_than_slots_keep_the_last(target: Target) -> None:
    buffer = make(4, num_classes=11, device=target.device)
    index = buffer.extend(torch.arange(11.0), torch.arange(11))
    assert index.tolist() == [k % 4 for k in range(11)]
    assert sorted(buffer._state.rows.tolist()) == [7, 8, 9, 10]
    assert buffer.class_counts().tolist() == [0] * 7 + [1] * 4


def test_new_rows_get_the_running_maximum_once(target: Target) -> None:
    buffer = make(10, device=target.device)
    index = buffer.extend(torch.zeros(2))
    assert buffer.top_k(2).priority.tolist() == [1.0, 1.0]  # 1 before the first
    buffer.update_priority(index, [0.5, 7.0])
    newer = buffer.extend(torch.zeros(1))
    assert buffer.top_k(2).priority.tolist() == [7.0, 7.0]
    probability = buffer.sample(60).probability[buffer.sample(60).index == newer[0]]
    mass = torch.tensor([0.5, 7.0, 7.0], dtype=torch.float64).add(1e-6) ** 0.6
    assert float(probability[0]) == pytest.approx(float(mass[2] / mass.sum()), rel=1e-6)
    buffer.update_priority(newer, [0.1])
    assert buffer.extend(torch.zeros(1)) is not None
    assert buffer.top_k(4).priority.tolist() == pytest.approx([7.0, 7.0, 0.5, 0.1])


def test_overwritten_rows_keep_their_new_priority(target: Target) -> None:
    buffer = make(3, device=target.device)
    buffer.extend(torch.arange(3.0), priorities=[1.0, 1.0, 1.0])
    batch = buffer.sample(6)
    assert set(batch.index.tolist()) == {0, 1, 2}
    buffer.extend(torch.tensor([9.0]), priorities=[2.0])  # overwrites slot 0
    buffer.update_priority(batch.index, torch.full((6,), 5.0), batch.generation)
    assert buffer._state.delta.tolist() == [2.0, 5.0, 5.0]
    assert buffer.stats().stale == batch.index.tolist().count(0)
    buffer.update_priority(batch.index, torch.full((6,), 5.0))  # without generations the slot counts
    assert buffer._state.delta.tolist() == [5.0, 5.0, 5.0]


@pytest.mark.parametrize(("duplicates", "expected"), [("last", 0.5), ("max", 3.0)])
def test_duplicates_in_an_update(target: Target, duplicates: str, expected: float) -> None:
    buffer = numbered(3, device=target.device, duplicates=duplicates)
    buffer.update_priority([1, 1, 1, 1], [2.0, -3.0, 0.5, math.nan])
    assert buffer._state.delta.tolist() == [1.0, expected, 1.0]


def test_priorities_that_are_not_finite_are_contained(target: Target) -> None:
    buffer = numbered(3, [1.0, 2.0, 3.0], device=target.device)
    buffer.update_priority([0, 1, 2], [math.nan, math.inf, -4.0])
    assert buffer._state.delta.tolist() == [1.0, 2.0, 4.0]
    buffer.extend(torch.zeros(2), priorities=[-math.inf, 0.5])
    assert buffer._state.delta.tolist() == [4.0, 0.5, 4.0]
    assert buffer.stats().non_finite == 3


def test_strict_buffers_raise_on_priorities_that_are_not_finite(target: Target) -> None:
    buffer = numbered(3, [1.0, 2.0, 3.0], device=target.device, strict=True)
    with pytest.raises(ValueError, match="finite"):
        buffer.update_priority([0, 1], [5.0, math.nan])
    with pytest.raises(ValueError, match="finite"):
        buffer.extend(torch.zeros(1), priorities=[math.inf])
    assert buffer._state.delta.tolist() == [1.0, 2.0, 3.0]
    assert buffer.stats().inserted == 3


def test_saturation_is_counted_and_the_scale_moves_it(target: Target) -> None:
    buffer = numbered(2, [1.0, 1e20], alpha=1.0, device=target.device)
    buffer.update_priority([0], [2e9])
    assert buffer.stats().saturated == 2
    assert buffer.stats().floored == 0
    assert buffer.sample(10).index.cpu().bincount().tolist() == [5, 5]
    wider = numbered(2, [1.0, 2e9], alpha=1.0, scale=1.0, device=target.device)
    assert wider.stats().saturated == 0
    wider.update_priority([0], [0.25])
    assert wider.stats().floored == 1


def test_samples_are_copies(target: Target) -> None:
    buffer = numbered(4, device=target.device)
    buffer.sample(4).samples.fill_(-1)
    rows = torch.full((2,), 7.0, device=target.device)
    buffer.extend(rows)
    rows.fill_(-1)
    assert buffer._state.rows.tolist() == [7, 7, 2, 3]


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 6, 6)])
def test_normalised_samples(target: Target, shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, (6, *shape), dtype=torch.uint8)
    raw = PrioritizedReplayBuffer(6, shape, device=target.device)
    raw.extend(images)
    mean, std = [0.5, 0.4, 0.3][: shape[0]], [0.2, 0.25, 0.3][: shape[0]]
    batch = raw.sample(12, normalize=(mean, std))
    pixels = images[batch.index.cpu()].double() / 255
    expected = (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    assert batch.samples.dtype == torch.float32
    torch.testing.assert_close(batch.samples.cpu().double(), expected.double(), rtol=1e-6, atol=1e-6)
    one = raw.sample(3, normalize=(0.5, torch.tensor([0.2] * shape[0])))
    torch.testing.assert_close(
        one.samples.cpu(), (images[one.index.cpu()].float() / 255 - 0.5) / 0.2, rtol=1e-5, atol=1e-5
    )


def test_rows_without_labels(target: Target) -> None:
    buffer = make(4, num_classes=2, device=target.device)
    buffer.extend(torch.zeros(2), [1, 1])
    buffer.extend(torch.zeros(3))
    assert buffer.class_counts().tolist() == [0, 1]
    assert sorted(set(buffer.sample(8).labels.tolist())) == [-1, 1]


def test_labels_are_kept_without_counting(target: Target) -> None:
    buffer = make(2, device=target.device)
    buffer.extend(torch.zeros(2), [1000, 3])
    assert set(buffer.sample(8).labels.tolist()) == {1000, 3}


def test_top_k(target: Target) -> None:
    buffer = numbered(5, [0.5, 3.0, 0.5, 9.0, 3.0], device=target.device)
    top = buffer.top_k(4)
    assert top.index.tolist() == [3, 1, 4, 0]  # the lower slot first of equals
    assert top.priority.tolist() == [9.0, 3.0, 3.0, 0.5]
    assert len(buffer.top_k(99).index) == 5
    assert len(buffer.top_k(0).index) == 0


def test_stats(target: Target) -> None:
    buffer = make(6, device=target.device)
    empty = buffer.stats()
    assert (empty.size, empty.effective_size) == (0, 0.0)
    assert math.isnan(empty.max_priority)
    assert math.isnan(empty.mean_priority)
    buffer.extend(torch.zeros(4), priorities=[1.0, 1.0, 1.0, 1.0])
    buffer.sample(2)
    stats = buffer.stats()
    assert (stats.size, stats.capacity, stats.inserted, stats.draws) == (4, 6, 4, 1)
    assert (stats.max_priority, stats.mean_priority) == (1.0, 1.0)
    assert stats.effective_size == pytest.approx(4)


def test_rebuild_changes_nothing(target: Target) -> None:
    buffer = numbered(300 if INTERPRETING else 1000, device=target.device)
    buffer.update_priority([1, 2], [3.0, 4.0])
    before = buffer._state.sums.clone()
    buffer.rebuild()
    assert torch.equal(before, buffer._state.sums)


def test_removed_rows_are_never_drawn_and_their_slots_are_used_next(target: Target) -> None:
    for eviction in ("lowest", "class_balanced"):
        buffer = make(4, num_classes=2, eviction=eviction, device=target.device)
        buffer.extend(torch.arange(4.0), [0, 1, 1, 1])
        buffer.remove([1, 1, 3])
        assert len(buffer) == 2
        assert buffer.class_counts().tolist() == [1, 1]
        assert set(buffer.sample(20).index.tolist()) == {0, 2}
        assert sorted(buffer.extend(torch.tensor([8.0, 9.0]), [0, 0]).tolist()) == [1, 3]
        assert buffer.stats().evicted == 0
    everything = numbered(2, device=target.device)
    everything.remove([0, 1])
    assert len(everything) == 0
