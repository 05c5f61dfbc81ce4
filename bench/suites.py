"""The cases of kdfast.benchmarks as pytest-benchmark suites: same inputs, same checks, another stopwatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from itertools import count
from typing import Any

import pytest
import torch

from kdfast.benchmarks import Absent, Case, Provider, Settings, cases_of


def rows(suite: str) -> list[Any]:
    """A parameter for each provider of each case of a suite that is of no family: whole steps, epochs, data."""
    return _parameters(lambda settings: import_module(f"kdfast.benchmarks.{suite}").cases(settings))


def family(name: str) -> list[Any]:
    """A parameter for each provider of each case of one family of kernels, whichever suite it is in."""
    return _parameters(lambda settings: cases_of(name, settings))


def _parameters(cases: Callable[[Settings], Iterable[Case]]) -> list[Any]:
    """On the CPU, and marked ``gpu`` on CUDA where there is one."""
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for case in cases(Settings(device, quick=True)):
            for provider in case.providers:
                name = f"{case.key.partition('/')[2]} {provider.name} {device}"
                found.append(pytest.param(case, provider, device, id=name, marks=marks))
    return found


def measure(benchmark: Any, case: Case, provider: Provider, device: str) -> None:
    """Check the provider, then let pytest-benchmark time it; skip, with the reason, one that cannot run."""
    try:
        work = provider.build()
    except Absent as reason:
        pytest.skip(str(reason))
    case.check(provider.name, work(0))
    benchmark.group = case.key
    benchmark.extra_info |= {"torch": torch.__version__, "items": case.items, "unit": case.unit}
    if provider.traffic is not None:
        benchmark.extra_info |= {"formula": provider.traffic.formula, "bytes": provider.traffic.num_bytes}
    turns = count()

    def step() -> None:
        work(next(turns))
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=5 if case.suite in ("data", "synth") else 50, warmup_rounds=2)
