"""Machines to plan for, and plans whose thresholds are so low that small rows take every regime."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator

import pytest

import kdfast

#: A100, H100 (also with Triton 3.6, which lays tiles out differently), two multiprocessors of an H100 and a B200 (which
#: few rows fill: then a row gets tickets, or a cluster), and what the interpreter is.
MACHINES = ("80:108", "90:132", "90:132:3.6", "90:2:3.6", "100:2", "0:1")

#: (module, threshold, what it is lowered to): below these sizes a plan takes what it takes for small ones.
LOWERED = (
    ("kl.plan", "MAX_ROW", 32),
    ("kl.plan", "MAX_CLUSTER_ROW", 128),
    ("kl.plan", "CLUSTER_PART", 32),
    ("kl.plan", "LONG_BLOCK", 128),
    ("kl.plan", "SPLIT_BLOCK", 128),
    ("kl.plan", "CACHES", ((80, 0),)),
    ("kl.plan", "TICKET_BYTES", 1024),
    ("kl.plan", "TICKET_THREADS", 32),
    ("kl.plan", "MAX_CLASSES", 7),
    ("kl.plan", "MAX_TUPLE", 5),
    ("kl.plan", "MIN_WINDOW", 9),
    ("pair.plan", "MAX_ROW", 8),
    ("pair.plan", "MAX_CLASSES", 4),
    ("pair.plan", "LOOP_THREADS", 16),
    ("norm.plan", "SMALL", 0),
    ("denoise.plan", "SMALL", 0),
)


@contextlib.contextmanager
def low_thresholds() -> Iterator[None]:
    """Plans as they would be if every threshold were reached by a small shape."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in LOWERED:
            patch.setattr(importlib.import_module(f"kdfast.kernels.{module}"), name, value)
        _forget_plans()
        yield
    _forget_plans()


@pytest.fixture
def lowered() -> Iterator[None]:
    """The kernels, with low thresholds."""
    with low_thresholds(), kdfast.use_backend("triton"):
        yield


def _forget_plans() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("kdfast.kernels.") and name.endswith(".plan"):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()
