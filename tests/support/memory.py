"""What a process has in memory, while it works."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["MIB", "assert_flat", "resident"]

MIB = 1 << 20


def resident() -> int:
    """Bytes of this process in memory, without what its allocator keeps of earlier tests: a leak could hide in that."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_flat(work: Iterable[int], *, settled: int, room: int, what: str) -> None:
    """What is in memory once so much is done is all that there will be.

    Args:
        work: How much is done, each time that some more is.
        settled: From then on.
        room: Bytes that allocators may still take.
        what: Is done, for the figures that are printed.
    """
    seen: list[tuple[int, int]] = []
    for done in work:
        seen.append((done, resident()))
    first = next(size for done, size in seen if done >= settled)
    told = ", ".join(f"{size / MIB:.0f} MiB after {done:,}" for done, size in seen[:: max(1, len(seen) // 5)])
    print(f"{what}: {told}; {seen[-1][1] / MIB:.0f} MiB after {seen[-1][0]:,}")
    assert seen[-1][1] - first < room, seen
