"""The replay tree as torchrl's sampler: alone, and inside torchrl's buffer where that can be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kdfast
from kdfast.adapters import PrioritySampler, torchrl_sampler
from kdfast.errors import MissingExtraError
from kdfast.replay import PrioritizedReplayBuffer
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.interpreter if INTERPRETING else []  # on the kernels too: rows of no elements


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with kdfast.use_backend("triton" if INTERPRETING else "reference"):
        yield


def filled(capacity: int = 8, rows: int = 6, **options: Any) -> PrioritySampler:
    sampler = PrioritySampler(capacity, **options)
    sampler.extend(torch.arange(rows))
    sampler.update_priority(torch.arange(rows), torch.arange(1.0, rows + 1))
    return sampler


def test_it_draws_what_the_buffer_draws() -> None:
    sampler = filled(alpha=0.7, beta=0.5, seed=3)
    buffer = PrioritizedReplayBuffer(8, (1,), alpha=0.7, beta=0.5, seed=3)
    buffer.extend(torch.zeros(6, 1, dtype=torch.uint8))
    buffer.update_priority(torch.arange(6), torch.arange(1.0, 7.0))
    for _ in range(3):
        index, info = sampler.sample(None, 16)
        want = buffer.sample(16)
        assert torch.equal(index, want.index)
        assert torch.equal(info["priority_weight"], want.weight)


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"beta": 0.0}, {"eps": 5.0}, {"seed": 1}, {"max_normalize": True}], ids=str
)
def test_every_option_counts(options: dict[str, Any]) -> None:
    draws = [filled(**given).sample(None, 32) for given in ({}, options)]
    same = torch.equal(draws[0][0], draws[1][0])
    assert not (same and torch.equal(draws[0][1]["priority_weight"], draws[1][1]["priority_weight"]))


def test_slots_go_round_and_new_rows_get_the_largest_priority() -> None:
    sampler = filled()
    assert sampler.default_priority == 6.0
    sampler.add(6)
    sampler.extend(torch.tensor([7, 0, 1]))
    held = sampler.tree.top_k(8)
    by_slot = dict(zip(held.index.tolist(), held.priority.tolist(), strict=True))
    assert by_slot == {0: 6.0, 1: 6.0, 2: 3.0, 3: 4.0, 4: 5.0, 5: 6.0, 6: 6.0, 7: 6.0}
    sampler.extend(torch.arange(0))
    assert len(sampler.tree) == 8


@pytest.mark.parametrize("index", [torch.tensor([3, 4]), torch.tensor([6, 5]), (torch.tensor([0]),)])
def test_a_writer_that_chooses_is_refused(index: Any) -> None:
    sampler = filled()
    before = sampler.state_dict()["tree"]
    with pytest.raises(ValueError, match="index: got"):
        sampler.extend(index)
    after = sampler.state_dict()["tree"]
    assert str(before) == str(after)


def test_one_priority_does_for_many_slots() -> None:
    sampler = filled()
    sampler.update_priority([0, 1, 2], 9.0)
    assert sorted(sampler.tree.top_k(3).index.tolist()) == [0, 1, 2]


def test_it_begins_empty_and_can_be_emptied() -> None:
    sampler = PrioritySampler(4)
    assert sampler.default_priority == 1.0
    assert not sampler.ran_out
    with pytest.raises(ValueError, match="empty"):
        sampler.sample(None, 1)
    sampler.extend(torch.arange(3))
    sampler._empty()
    assert len(sampler.tree) == 0
    sampler.extend(torch.arange(2))


@pytest.mark.parametrize("way", ["state_dict", "file"])
def test_saved_and_put_back_it_goes_on(way: str, tmp_path: Path) -> None:
    sampler, other = filled(), PrioritySampler(8, seed=9)
    sampler.sample(None, 4)
    if way == "file":
        for _ in range(2):
            sampler.dumps(tmp_path / "sampler")
        other.loads(tmp_path / "sampler")
    else:
        other.load_state_dict(sampler.state_dict())
    for one in (sampler, other):
        one.extend(torch.tensor([6, 7]))
    assert torch.equal(sampler.sample(None, 16)[0], other.sample(None, 16)[0])


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "sampler-3.kdfast.tmp-0123456789abcdef").write_text("half")
    filled().dumps(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sampler-6.kdfast"]


def test_without_torchrl_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchrl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchrl", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"kdfast\[bench\]\""):
        torchrl_sampler(4)


@pytest.mark.slow
def test_torchrl_s_buffer_takes_it(tmp_path: Path) -> None:
    try:
        from torchrl.data import LazyTensorStorage, ReplayBuffer
    except Exception as error:  # beside another torch its binaries raise anything at all
        pytest.skip(f"torchrl cannot be imported: {error}")
    rows = torch.arange(6.0)
    buffer = ReplayBuffer(storage=LazyTensorStorage(8), sampler=torchrl_sampler(8, seed=3), batch_size=32)
    index = buffer.extend(rows)
    buffer.update_priority(index, rows + 1)
    got, info = buffer.sample(return_info=True)
    want, weights = filled(seed=3).sample(None, 32)
    assert torch.equal(got, rows[want])
    assert torch.equal(torch.as_tensor(info["index"]), want)
    assert torch.equal(info["priority_weight"], weights["priority_weight"])
    buffer.extend(torch.arange(5.0))
    assert len(buffer) == len(buffer._sampler.tree) == 8
    state = buffer.state_dict()
    other = ReplayBuffer(storage=LazyTensorStorage(8), sampler=torchrl_sampler(8), batch_size=32)
    other.load_state_dict(state)
    assert torch.equal(buffer.sample(), other.sample())
