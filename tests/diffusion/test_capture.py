"""What is recorded, is recorded on the device of its tensors, whichever is current."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kdfast import capture


class FakeCuda:
    """torch.cuda on two devices, the first of them current: notes where streams are made and where captures run."""

    def __init__(self) -> None:
        self.current = 0
        self.seen: list[tuple[str, Any]] = []

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index or 0
        yield
        self.current = before

    def Stream(self, device: torch.device | None = None) -> FakeStream:
        return FakeStream(self.current if device is None else device.index)

    def current_stream(self, device: torch.device | None = None) -> FakeStream:
        return FakeStream(self.current if device is None else device.index)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.seen.append(("rehearsal", stream.device))
        yield

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph()

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, stream: FakeStream | None = None, **options: Any) -> Iterator[None]:
        # torch's default is one stream a process, on the device of the first capture.
        self.seen.append(("capture", 0 if stream is None else stream.device))
        yield


class FakeStream:
    def __init__(self, device: int | None) -> None:
        self.device = device

    def wait_stream(self, other: FakeStream) -> None:
        assert other.device == self.device


class FakeGraph:
    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generator = generator


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    monkeypatch.setattr(capture, "cuda", made)
    return made


def test_a_graph_is_recorded_where_its_tensors_are(fake: FakeCuda) -> None:
    where: list[int] = []
    _, result = capture.record(
        lambda: where.append(fake.current) or len(where), torch.device("cuda:1"), rehearsals=2
    )
    assert where == [1, 1, 1]
    assert fake.seen == [("rehearsal", 1), ("capture", 1)]
    assert result == 3
    assert fake.current == 0


def test_what_autocast_converted_stays_out_of_a_graph(fake: FakeCuda) -> None:
    cached: list[bool] = []
    before = torch.is_autocast_cache_enabled()
    capture.record(
        lambda: cached.append(torch.is_autocast_cache_enabled()), torch.device("cuda:0"), rehearsals=1
    )
    assert cached == [False, False]
    assert torch.is_autocast_cache_enabled() == before


def test_both_recorders_go_this_way() -> None:
    """A second way to record would have the fault again: nobody else names torch's."""
    from pathlib import Path

    import kdfast

    root = Path(kdfast.__file__).parent
    users = [
        path.name
        for path in root.rglob("*.py")
        if "CUDAGraph(" in path.read_text() and "benchmarks" not in path.parts
    ]
    assert users == ["capture.py"]


def test_a_table_that_a_graph_reads_outlives_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """More schedules than a cache holds, or a schedule that is replaced: a captured step reads where it always read."""
    pytest.importorskip("diffusers")
    from kdfast.diffusion.schedulers import common

    cache = common.TableCache(limit=2)
    source, cpu = torch.zeros(1), torch.device("cpu")

    def table(key: int) -> weakref.ref[torch.Tensor]:
        return weakref.ref(cache.get(key, cpu, torch.float32, [source], lambda: torch.zeros(3)))

    plain = table(0)
    monkeypatch.setattr(common, "capturing", lambda device: True)
    captured = table(1)
    monkeypatch.setattr(common, "capturing", lambda device: False)
    for key in range(2, 6):
        table(key)
    assert plain() is None
    assert captured() is not None
