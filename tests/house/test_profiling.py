"""Ranges for profilers: where they come from, where they go, and that they cost nothing where nobody listens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kdfast.functional
from kdfast import profiling
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")
QUIET = {name: value for name, value in os.environ.items() if name != "KDFAST_PROFILE"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"KDFAST_PROFILE": "1"}, True),
        ({"KDFAST_PROFILE": "0"}, False),
        ({"KDFAST_PROFILE": ""}, False),
        ({"NSYS_PROFILING_SESSION_ID": "7"}, True),
        ({"NVTX_INJECTION64_PATH": "/lib/tool.so"}, True),
        ({"NSYS_PROFILING_SESSION_ID": "7", "KDFAST_PROFILE": "0"}, False),
    ],
)
def test_a_profiler_is_noticed_by_its_environment(environment: dict[str, str], wanted: bool) -> None:
    assert profiling._wanted(environment) is wanted


def test_without_a_profiler_nothing_is_wrapped() -> None:
    """Not a cheap wrapper but none: the function and the iterator that went in come out."""
    assert not profiling.enabled()

    def function() -> None: ...

    items = iter([1])
    assert profiling.annotate("x")(function) is function
    assert profiling.each("x", items) is items
    assert profiling.phase("x") is profiling.phase("y")
    for name in kdfast.functional.__all__:
        assert not hasattr(getattr(kdfast.functional, name), "__wrapped__"), name


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ranges are on, on what looks like a CUDA build, and go to torch.cuda.nvtx as `heard` writes them down."""
    heard: list[str] = []
    fake = types.SimpleNamespace(
        range_push=lambda name: heard.append(f"+{name}"), range_pop=lambda: heard.append("-")
    )
    monkeypatch.setattr(profiling, "_ENABLED", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    monkeypatch.setitem(sys.modules, "nvtx", None)
    profiling._nvtx.cache_clear()
    yield heard
    profiling._nvtx.cache_clear()


def test_without_the_package_ranges_carry_a_prefix(listening: list[str]) -> None:
    @profiling.annotate("op")
    def op(value: int, *, more: int) -> int:
        """What it does."""
        return value + more

    assert op(1, more=2) == 3
    assert (op.__name__, op.__doc__) == ("op", "What it does.")
    with profiling.phase("outer"), profiling.phase("inner"):
        pass
    assert listening == ["+kdfast::op", "-", "+kdfast::outer", "+kdfast::inner", "-", "-"]


def test_ranges_end_where_an_error_leaves_them(listening: list[str]) -> None:
    @profiling.annotate("op")
    def op() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        op()
    assert listening == ["+kdfast::op", "-"]


def test_each_step_of_an_iterator_is_a_range_and_its_use_is_not(listening: list[str]) -> None:
    for item in profiling.each("load", iter("ab")):
        listening.append(item)
    assert listening == ["+kdfast::load", "-", "a", "+kdfast::load", "-", "b", "+kdfast::load", "-"]


def test_the_package_gets_a_domain(listening: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []

    class Domain:
        def get_event_attributes(self, message: str) -> str:
            return message.upper()

        def push_range(self, attributes: str) -> None:
            heard.append(attributes)

        def pop_range(self) -> None:
            heard.append(None)

    fake = types.SimpleNamespace(get_domain=lambda name: heard.append(name) or Domain())
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    for _ in range(2):
        with profiling.phase("load"):
            pass
    assert heard == ["kdfast", "LOAD", None, "LOAD", None]
    assert listening == []


def test_a_cpu_build_has_no_nvtx(listening: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with profiling.phase("load"):
        pass
    assert listening == []


def test_compiled_code_has_no_ranges_and_no_breaks(listening: list[str]) -> None:
    @profiling.annotate("op")
    def op(x: torch.Tensor) -> torch.Tensor:
        with profiling.phase("inside"):
            return x + 1

    compiled = torch.compile(op, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1]
    assert listening == []


PROBE = """
import json, sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile
import kdfast.functional as K
from kdfast.data.loader import ShardLoader
from kdfast.training.trainer import Trainer
from kdfast.replay import PrioritizedReplayBuffer
from kdfast.diffusion import DDIMScheduler

s, t = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
plain = K.kd_kl_div(s, t, 2.0)
torch.testing.assert_close(torch.compile(K.kd_kl_div, fullgraph=True, backend="eager")(s, t, 2.0), plain)
grad = torch.func.grad(lambda s: K.kd_kl_div(s, t, 2.0))(s.detach())
plain.backward()
torch.testing.assert_close(grad, s.grad)
torch.func.vmap(lambda s, t: K.jsd_loss(s, t))(s.detach()[None], t[None])
with FakeTensorMode() as mode:
    fake = torch.empty(4, 6), torch.empty(4, 6)
    assert K.kd_statistics(*fake).kl.shape == (4,)
buffer = PrioritizedReplayBuffer(8, (2,))
buffer.extend(torch.zeros(4, 2, dtype=torch.uint8))
scheduler = DDIMScheduler(); scheduler.set_timesteps(4)
with profile() as record:
    K.kd_kl_div(s, t, 2.0).backward()
    buffer.sample(2)
    scheduler.step(torch.zeros(1, 1, 2, 2), 750, torch.zeros(1, 1, 2, 2))
print(json.dumps({
    "seen": sorted({e.name for e in record.events() if e.name.startswith("kdfast::")}),
    "wrapped": [n for n in K.__all__ if hasattr(getattr(K, n), "__wrapped__")],
}))
"""


def test_every_public_op_has_a_range_under_a_profiler() -> None:
    """In a process of its own, as it is decided on import; there compile, grad, vmap and fakes work as ever."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=QUIET | {"KDFAST_PROFILE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    functions = [name for name in kdfast.functional.__all__ if not name[0].isupper()]
    assert sorted(found["wrapped"]) == sorted(functions), (
        "decorate public functions with kdfast.profiling.annotate"
    )
    assert set(found["seen"]) >= {
        "kdfast::kd_kl_div",
        "kdfast::closed_loss.backward",
        "kdfast::replay.sample",
        "kdfast::DDIMScheduler.step",
    }
