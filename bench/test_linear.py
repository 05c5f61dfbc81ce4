"""The linear suite under pytest-benchmark: `make bench BENCH_ARGS="-k ..."`."""

from __future__ import annotations

from typing import Any

import pytest

from bench import suites
from kdfast.benchmarks import Case, Provider


@pytest.mark.parametrize(("case", "provider", "device"), suites.rows("linear"))
def test_linear(benchmark: Any, case: Case, provider: Provider, device: str) -> None:
    suites.measure(benchmark, case, provider, device)
