"""Benchmarks of kdfast beside what people use without it: eager PyTorch, ``torch.compile`` and peer libraries.

``python -m kdfast.benchmarks --device cpu --quick --out DIR``, or ``kdfast bench``. A provider is checked before it
is timed, one that cannot run says why, and a ratio is only given between samples of one kind from one run.
"""

from kdfast.benchmarks.case import Absent, Case, Provider, Settings, Traffic
from kdfast.benchmarks.run import FAMILIES, SUITES, cases_of, make_settings, measure, run, succeeded, write

__all__ = [
    "FAMILIES",
    "SUITES",
    "Absent",
    "Case",
    "Provider",
    "Settings",
    "Traffic",
    "cases_of",
    "make_settings",
    "measure",
    "run",
    "succeeded",
    "write",
]
