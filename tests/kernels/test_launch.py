"""Launches under a compiler: no memory that outlives the call, and no pointer into host memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import kdfast
from tests.conftest import INTERPRETING

pytest.importorskip("triton")

from kdfast.kernels import launch
from kdfast.kernels.common.scale import Scale

OPS = Path(kdfast.__file__).parent / "ops"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """What arrival_counter asks of CUDA, answered on a CPU."""

    class Stream:
        cuda_stream = 7

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: real(*size, **options))
    monkeypatch.setattr(launch, "_counters", {})
    return torch.device("cuda", 0)


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


@pytest.mark.parametrize("path", ["common/launch_rows.py", "kl/launch.py", "dist/launch.py"])
def test_launchers_that_read_the_scale_look_where_it_lies(path: str) -> None:
    text = (Path(launch.__file__).parent / path).read_text()
    assert re.search(r"scale = (Scale\(\*scale\)|scale)\.on\((student\.)?device\)", text)
