"""The replay buffer: CUDA graphs and streams, turns, settings that change, inference mode."""

from __future__ import annotations

import math
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdfast
from kdfast import _C
from kdfast.reference.replay import ReplayState
from kdfast.replay import PrioritizedReplayBuffer
from tests.conftest import INTERPRETING, Target
from tests.replay.test_buffer import make, numbered  # helpers

# --- CUDA only -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_graph_replays_draw_anew() -> None:
    buffer = numbered(5000, torch.rand(5000) + 0.1, device="cuda")
    static = buffer.sample(256)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            static = buffer.sample(256)
            buffer.update_priority(static.index, static.weight, static.generation)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            static = buffer.sample(256)
            buffer.update_priority(static.index, static.weight, static.generation)
    seen = set()
    for _ in range(1000):
        graph.replay()
        seen.add(tuple(static.index.tolist()))
    assert len(seen) == 1000
    before = buffer._state.sums.clone()
    buffer.rebuild()
    assert torch.equal(before, buffer._state.sums)


@pytest.mark.gpu
def test_streams_wait_for_each_other() -> None:
    buffer = make(1000, (1000,), device="cuda")
    rows = torch.arange(1000.0, device="cuda").expand(1000, 1000).t().contiguous()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        buffer.extend(rows)
    with torch.cuda.stream(torch.cuda.Stream()):
        batch = buffer.sample(64)
    torch.cuda.synchronize()
    assert torch.equal(batch.samples[:, 0].long(), batch.index)


@pytest.mark.gpu
def test_the_first_call_waits_for_the_stream_of_the_constructor() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        buffer = make(1000, (1000,), device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        buffer.extend(torch.ones(1000, 1000, device="cuda"))
        batch = buffer.sample(64)
    torch.cuda.synchronize()
    assert bool((batch.samples == 1).all())
    assert len(buffer) == 1000


class FakeStream:
    """Writes down whom it waits for."""

    def __init__(self, waits: list[Any]) -> None:
        self.waits = waits

    def wait_stream(self, other: Any) -> None:
        self.waits.append((self, other))


def test_every_call_follows_the_stream_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of streams alone, without a GPU: each call waits for the stream that was used last."""
    waits: list[Any] = []
    made, side, current = FakeStream(waits), FakeStream(waits), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(ReplayState, "device", property(lambda self: torch.device("cuda")))
    current.append(made)
    buffer = make(8)
    assert buffer._state.stream is made
    current.append(side)
    buffer._state.follow()
    assert waits == [(side, made)]
    buffer._state.follow()
    assert waits == [(side, made)]
    current.append(made)
    buffer._state.follow()
    assert waits[1:] == [(made, side)]


def test_launches_of_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the order of streams to the launch nobody else comes between."""
    if not INTERPRETING:
        pytest.skip("no launches")
    from kdfast.kernels import replay as kernels

    buffer = numbered(20)
    inside: list[int] = []

    def slowly(*args: Any, **options: Any) -> Any:
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.01)
        inside.pop()
        return original(*args, **options)

    original = kernels.sample
    monkeypatch.setattr(kernels, "sample", slowly)
    errors: list[BaseException] = []

    def draw() -> None:
        try:
            for _ in range(5):
                buffer.sample(4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    with kdfast.use_backend("triton"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert buffer.stats().draws == 20


test_launches_of_threads_take_turns.pytestmark = [pytest.mark.interpreter]  # type: ignore[attr-defined]


# --- settings that change, and inference mode ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (math.nan, ValueError, "beta: got nan"),
        (-1.0, ValueError, "beta: got -1.0"),
        (math.inf, ValueError, "beta: got inf"),
        (5, ValueError, "product is 3; accepted: below 1"),
        ("0.5", TypeError, "beta: got '0.5'"),
        (True, TypeError, "beta: got True"),
    ],
)
def test_beta_is_checked_when_it_is_assigned(value: Any, kind: type[Exception], message: str) -> None:
    buffer = make(3)
    with pytest.raises(kind, match=message):
        buffer.beta = value
    assert buffer.beta == 0.4
    buffer.beta = 1
    assert buffer.beta == 1.0
    with pytest.raises(AttributeError):
        buffer.num_classes = 3  # type: ignore[misc]


def test_nothing_is_drawn_after_the_last_row_was_removed(target: Target) -> None:
    buffer = numbered(3, device=target.device)
    buffer.remove([0, 1, 2])
    with pytest.raises(ValueError, match="the buffer is empty"):
        buffer.sample(2)
    assert math.isnan(buffer.stats().mean_priority)
    buffer.extend(torch.ones(1))
    assert buffer.sample(2).samples.tolist() == [1.0, 1.0]


def test_what_was_made_in_inference_mode_works_outside(target: Target) -> None:
    with torch.inference_mode():
        buffer = numbered(4, device=target.device)
        state = buffer.state_dict()
        again = make(4, device=target.device)
        again.load_state_dict(state)
    for one in (buffer, again):
        one.extend(torch.zeros(2))
        one.load_state_dict(state)
        batch = one.sample(3)
        one.update_priority(batch.index, batch.weight, batch.generation)
        one.remove([1])
        assert len(one) == 3


@pytest.mark.parametrize("copied", ["made", "loaded", "pickled", "from_file"])
def test_memory_that_was_made_in_inference_mode_is_written_outside(copied: str, tmp_path: Path) -> None:
    """The C++ core and the kernels write past torch; on a GPU, and under torch.compile, torch writes itself."""
    with torch.inference_mode():
        buffer = make(4, (1,))
        buffer.extend(torch.arange(4.0).view(4, 1))
        if copied == "loaded":
            state, buffer = buffer.state_dict(), make(4, (1,))
            buffer.load_state_dict(state)
        elif copied == "pickled":
            buffer = pickle.loads(pickle.dumps(buffer))
        elif copied == "from_file":
            buffer.save(tmp_path / "buffer")
            buffer = PrioritizedReplayBuffer.load(tmp_path / "buffer")
        buffer.sample(2, normalize=(0.5, 2.0))
    state = buffer._state
    for name in (*ReplayState.BOOKKEEPING, "rows"):
        memory = getattr(state, name)
        memory.copy_(memory.clone())  # as after the work on the host that a GPU's state is copied to
    settings = (state.rule.alpha, state.rule.eps, state.rule.scale, False)
    memory = (state.meta, state.leaves, state.sums, state.delta, state.generation)
    torch.ops.kdfast.replay_update(*memory, torch.tensor([2]), torch.tensor([7.0]), None, *settings)
    assert buffer.top_k(1).index.tolist() == [2]
    rows = torch.ones(1, requires_grad=True)
    for kept in next(iter(buffer._affine.values())):
        (rows * kept).sum().backward()


def test_normalisations_do_not_pile_up() -> None:
    buffer = PrioritizedReplayBuffer(2, (3, 2, 2))
    buffer.extend(torch.zeros(2, 3, 2, 2, dtype=torch.uint8))
    for k in range(200):
        buffer.sample(1, normalize=(k / 1000, 1.0))
    assert len(buffer._affine) <= 64


def test_normalisations_that_a_graph_may_read_are_kept() -> None:
    """On a GPU no table is forgotten: a captured graph would go on reading its memory."""
    buffer = PrioritizedReplayBuffer(2, (3, 2, 2))
    buffer._state.__dict__["on_cpu"] = False
    first = buffer._normalization((0.25, 1.0))
    for k in range(100):
        buffer._normalization((1 + k / 1000, 1.0))
    assert buffer._normalization((0.25, 1.0)) is first


def test_rings_and_histograms_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="num_classes: got -3"):
        _C.RingSlots(5, "fifo", -3)
    with pytest.raises(ValueError, match="num_classes: got 0, accepted: at least 1"):
        _C.RingSlots(5, "class_balanced", 0)
    histogram = _C.ClassHistogram(2)
    histogram.add(np.array([1, 1]))
    with pytest.raises(ValueError, match="labels: got 1 more often than it is held, 2"):
        histogram.remove(np.array([1, 1, 1]))
    assert histogram.counts.tolist() == [0, 2]
