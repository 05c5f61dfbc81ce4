"""Balanced selection and the relative entropy of a histogram."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.data import relative_entropy, select_balanced


@settings(max_examples=200, deadline=None)
@given(
    predictions=st.lists(st.integers(0, 6), min_size=1, max_size=80),
    budget=st.integers(1, 100),
    seed=st.integers(0, 5),
)
def test_the_rule(predictions: list[int], budget: int, seed: int) -> None:
    present = Counter(predictions)
    if budget < len(present):
        with pytest.raises(ValueError, match=f"budget: got {budget} for {len(present)} predicted classes"):
            select_balanced(predictions, budget, 7, seed=seed)
        return
    chosen = select_balanced(predictions, budget, 7, seed=seed)
    assert chosen.dtype == torch.int64
    assert chosen.shape == (budget,)
    per_class = Counter(predictions[i] for i in chosen.tolist())
    # Equal shares over the classes that occur; one more at most, and never for a class with fewer images.
    assert set(per_class) == set(present)
    share = budget // len(present)
    assert set(per_class.values()) <= {share, share + 1}
    more = [present[c] for c in present if per_class[c] == share + 1]
    less = [present[c] for c in present if per_class[c] == share]
    assert not more or not less or min(more) >= max(less)
    # Without replacement where there are enough; replicated as evenly as can be where not.
    uses = Counter(chosen.tolist())
    for label, available in present.items():
        mine = [uses.get(i, 0) for i, p in enumerate(predictions) if p == label]
        assert max(mine) == math.ceil(per_class[label] / available)
        assert max(mine) - min(mine) <= 1


def test_the_seed_alone_decides() -> None:
    predictions = torch.randint(0, 10, (500,))
    first = select_balanced(predictions, 200, 10, seed=1)
    assert torch.equal(first, select_balanced(predictions.numpy(), 200, 10, seed=1))
    assert not torch.equal(first, select_balanced(predictions, 200, 10, seed=2))
    # Not sorted by class: whoever writes them in this order has mixed shards.
    labels = predictions[first]
    assert (labels.diff() < 0).any()


def test_draws_are_uniform_within_a_class() -> None:
    predictions = torch.tensor([0] * 10 + [1] * 10)
    uses = sum(torch.bincount(select_balanced(predictions, 10, 2, seed=s), minlength=20) for s in range(400))
    # 5 of 10 in each of 400 draws: 200 expected, ten a standard deviation.
    assert uses.min() > 150
    assert uses.max() < 250


def test_one_class_for_everything() -> None:
    chosen = select_balanced([3] * 5, 8, 10, seed=0)
    assert sorted(Counter(chosen.tolist()).values()) == [1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "predictions, error, message",
    [
        ([], ValueError, r"predictions: got shape \[0\]"),
        ([[1, 2]], ValueError, r"predictions: got shape \[1, 2\]"),
        ([0, 5], ValueError, r"class 5 at row 1 is outside \[0, 5\)"),
        ([-1, 0], ValueError, "class -1 at row 0"),
        ([0.0, 1.0], TypeError, "predictions: got float64"),
    ],
)
def test_selection_refuses(predictions: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select_balanced(predictions, 10, 5, seed=0)


def test_relative_entropy_of_known_histograms() -> None:
    assert relative_entropy([7, 7, 7]) == 1.0
    assert relative_entropy([9, 0, 0, 0]) == 0.0
    assert relative_entropy([5]) == 0.0
    # Half the classes, evenly: log(C/2) / log C.
    assert relative_entropy([1] * 8 + [0] * 8) == pytest.approx(math.log(8) / math.log(16), rel=1e-15)
    # H(1/4, 3/4) in bits, of one.
    assert relative_entropy(torch.tensor([1, 3])) == pytest.approx(2 - 0.75 * math.log2(3), rel=1e-14)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=50).filter(any))
def test_relative_entropy_is_a_share_and_ignores_order_and_scale(counts: list[int]) -> None:
    value = relative_entropy(counts)
    assert 0 <= value <= 1
    assert relative_entropy(counts[::-1]) == pytest.approx(value, abs=1e-12)
    assert relative_entropy(np.array(counts) * 3.0) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("counts", [[], [0, 0], [1, -1], [float("nan"), 1.0], [[1, 2]]])
def test_relative_entropy_refuses(counts: list) -> None:
    with pytest.raises(ValueError, match="counts: "):
        relative_entropy(counts)
