"""Launches under a compiler: no memory that outlives the call, and no pointer into host memory."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import kdfast
from tests.conftest import INTERPRETING

pytest.importorskip("triton")

from kdfast.kernels import launch, scratch
from kdfast.kernels.common.scale import Scale

OPS = Path(kdfast.__file__).parent / "ops"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """What arrival_counter asks of CUDA, answered on a CPU."""

    class Stream:
        cuda_stream = 7

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(launch, "_raw_stream", None)
    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch, name, _on_the_host(getattr(torch, name)))
    for name in ("_counters", "_reductions", "_graph_counters"):
        monkeypatch.setattr(launch, name, {})
    return torch.device("cuda", 0)


def _on_the_host(make: Any) -> Any:
    return lambda *size, device=None, **options: make(*size, **options)


@pytest.fixture
def fills(on_a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is filled with zeros, each a launch of its own."""
    found: list[int] = []
    zeros = torch.zeros

    def filled(size: int, **options: Any) -> torch.Tensor:
        found.append(size)
        return zeros(size, **options)

    monkeypatch.setattr(torch, "zeros", filled)
    return found


def test_a_counter_is_kept_in_eager_calls_alone(on_a_gpu: torch.device) -> None:
    kept = launch.arrival_counter(on_a_gpu)
    assert launch.arrival_counter(on_a_gpu) is kept
    with launch.fresh_counters():
        assert launch.arrival_counter(on_a_gpu) is not kept
        with launch.fresh_counters():
            pass
        assert launch.arrival_counter(on_a_gpu) is not kept
    assert launch.arrival_counter(on_a_gpu) is kept
    assert len(launch._counters) == 1


def test_memory_for_sums_is_kept_and_grows_with_what_is_asked(on_a_gpu: torch.device) -> None:
    partial, counters, _ = first = launch.reduction(on_a_gpu, 7)
    assert partial.numel() >= 7
    assert launch.reduction(on_a_gpu, partial.numel()) is first
    assert launch.reduction(on_a_gpu, partial.numel() + 1)[0].numel() > partial.numel()
    partial, counters, one = grown = launch.reduction(on_a_gpu, 7, 5)
    assert counters.numel() >= 5
    assert not counters.any()
    assert one.dim() == 0
    assert launch.reduction(on_a_gpu, 7, 4) is launch.reduction(on_a_gpu, 2) is grown
    with launch.fresh_counters():
        fresh = launch.reduction(on_a_gpu, 7, 5)
    assert fresh[0] is not partial
    assert fresh[1].numel() >= 5
    # More than may be kept is one launch's.
    assert launch.reduction(on_a_gpu, launch.MAX_PARTIALS + 1)[0].numel() == launch.MAX_PARTIALS + 1
    assert launch.reduction(on_a_gpu, 7) is grown


def test_memory_between_two_launches_is_a_streams_own(
    on_a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_kept", {})
    kept = scratch.scratch(on_a_gpu, 7)
    assert (kept.dtype, kept.numel() >= 7) == (torch.float32, True)
    assert scratch.scratch(on_a_gpu, kept.numel()) is kept
    with launch.fresh_counters():  # a compiler's memory
        assert scratch.scratch(on_a_gpu, 7).data_ptr() != kept.data_ptr()
    captured(monkeypatch)
    assert scratch.scratch(on_a_gpu, 7).data_ptr() != kept.data_ptr()
    captured(monkeypatch, False)
    monkeypatch.setattr(scratch, "_stream", lambda device: 8)
    assert scratch.scratch(on_a_gpu, 7).data_ptr() != kept.data_ptr()
    monkeypatch.setattr(scratch, "_stream", lambda device: 7)
    assert scratch.scratch(on_a_gpu, 7) is kept
    assert scratch.scratch(on_a_gpu, launch.MAX_PARTIALS + 1).numel() == launch.MAX_PARTIALS + 1
    assert scratch.scratch(on_a_gpu, kept.numel() + 1).numel() > kept.numel()
    assert len(scratch._kept) == 2


def captured(monkeypatch: pytest.MonkeyPatch, capturing: bool = True) -> None:
    """Say that the current stream is being captured, or no longer."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)


def spans(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """First and last address of each, in order."""
    return sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors)


def test_captured_calls_fill_nothing(
    on_a_gpu: torch.device, fills: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = launch.reduction(on_a_gpu, 7)[1]  # the warm-up, without which nothing is captured
    assert fills == [1, launch.GRAPH_COUNTERS]
    captured(monkeypatch)
    counters = [launch.arrival_counter(on_a_gpu, count) for count in (1, 1, 5, 1)]
    counters += [launch.reduction(on_a_gpu, 7)[1] for _ in range(100)]
    with launch.fresh_counters():  # a compiler captures registered ops, too
        counters.append(launch.arrival_counter(on_a_gpu))
    assert fills == [1, launch.GRAPH_COUNTERS]
    assert [x.numel() for x in counters[:4]] == [1, 1, 5, 1]
    assert not any(x.any() for x in counters)
    captured(monkeypatch, False)
    assert launch.reduction(on_a_gpu, 7)[1] is eager
    assert fills == [1, launch.GRAPH_COUNTERS]


def test_captured_calls_share_no_counter(on_a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches of one graph, and two graphs, run side by side; and nobody says which call is in which."""
    kept = [launch.arrival_counter(on_a_gpu)]
    captured(monkeypatch)
    kept += [launch.arrival_counter(on_a_gpu, 1 + n % 9) for n in range(50)]
    kept += [launch.reduction(on_a_gpu, 3)[1] for _ in range(50)]
    captured(monkeypatch, False)
    kept.append(launch.arrival_counter(on_a_gpu, 3))
    taken = spans(kept)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
    # Kernels are compiled for addresses that 16 divides or for any, once a geometry.
    assert {x.data_ptr() % 16 for x in kept} == {0}


def test_a_graph_with_nothing_put_aside_fills_its_own(
    on_a_gpu: torch.device, fills: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory put aside during a capture would lie in the graph's pool, and be zero in no replay but the first."""
    captured(monkeypatch)
    assert launch.arrival_counter(on_a_gpu) is not launch.arrival_counter(on_a_gpu)
    assert fills == [1, 1]
    captured(monkeypatch, False)
    with launch.fresh_counters():  # its memory may be a pool's as well
        launch.arrival_counter(on_a_gpu)
    assert fills == [1, 1, 1]
    assert launch._graph_counters == launch._counters == {}
    monkeypatch.setattr(launch, "GRAPH_COUNTERS", 8)
    launch.arrival_counter(on_a_gpu)
    assert fills[3:] == [1, 8]
    captured(monkeypatch)
    first, second = launch.arrival_counter(on_a_gpu, 4), launch.arrival_counter(on_a_gpu, 5)
    third, fourth = launch.arrival_counter(on_a_gpu, 4), launch.arrival_counter(on_a_gpu)
    assert fills[5:] == [5, 1]  # five do not fit in the four that are left, and none are after these
    assert len(spans([first, second, third, fourth])) == 4


def _opcheck_cases() -> list[Any]:
    from tests.kernels.kl.test_kl import CASES as kl
    from tests.kernels.pair.test_pair import CASES as pair

    return [pytest.param(case, id=case.name) for case in (kl[0], pair[0])]


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="counts the interpreter's launches")
@pytest.mark.parametrize("case", _opcheck_cases())
def test_a_registered_op_takes_fresh_counters(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def counter(device: torch.device, count: int = 1) -> torch.Tensor:
        asked.append(getattr(launch._compiled, "fresh", False))
        return torch.zeros(count, dtype=torch.int32)

    monkeypatch.setattr(launch, "arrival_counter", counter)
    op, args = case.opcheck(case.inputs(case.small_shapes[0], torch.float32, "cpu"))
    with kdfast.use_backend("triton"):
        op(*args)
        case.run(**case.inputs(case.small_shapes[0], torch.float32, "cpu"))
    if asked:  # per-row losses count nothing
        assert asked[0] is True
        assert asked[-1] is False


def test_every_registered_op_that_may_reduce_says_so() -> None:
    """Each file that registers an op over a kernel with a counter enters fresh_counters()."""
    reducing = ["common/row_loss.py", "feature/mix.py", "feature/noise.py", "norm/registered.py"]
    reducing.append("norm/statistics_loss.py")
    for name in reducing:
        text = (OPS / name).read_text()
        assert len(re.findall(r"with fresh_counters\(\)", text)) == (
            3 if name == "norm/registered.py" else 1
        ), name


def test_a_temperature_in_host_memory_becomes_a_number_on_a_gpu() -> None:
    host = torch.tensor(2.5)
    scale = Scale(host, torch.tensor(4.0), None, None)
    moved = scale.on(torch.device("cuda", 0))
    assert moved == Scale(2.5, 4.0, None, None)
    assert not any(
        isinstance(value, torch.Tensor) for value in moved
    )  # which would be equal to their numbers
    assert scale.on(torch.device("cpu")).temperature is host


@pytest.mark.parametrize("path", ["common/launch_rows.py", "dist/launch.py"])
def test_launchers_that_read_the_scale_look_where_it_lies(path: str) -> None:
    text = (Path(launch.__file__).parent / path).read_text()
    assert re.search(r"scale = (Scale\(\*scale\)|scale)\.on\((student\.)?device\)", text)
