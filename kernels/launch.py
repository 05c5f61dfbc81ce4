"""One way to launch a kernel: every launch is counted, so that a test can tell which code ran."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import triton

#: Launches by kernel name since the process began (or since :func:`count_launches` was entered).
launch_counts: Counter[str] = Counter()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Launch ``kernel`` on ``grid`` (any length up to 3); an empty grid launches nothing."""
    if 0 in grid:
        return
    launch_counts[kernel.__name__] += 1
    kernel[grid](*args, **kwargs)


@contextlib.contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Count the launches of a block: ``with count_launches() as counts: ...``."""
    global launch_counts
    outer, launch_counts = launch_counts, Counter()
    try:
        yield launch_counts
    finally:
        outer.update(launch_counts)
        launch_counts = outer


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make ``tensor``'s GPU current, since Triton launches on the current one; nothing on a CPU."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def triton_version() -> tuple[int, int]:
    """Triton's (major, minor): tile orders and cluster launches depend on it."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
