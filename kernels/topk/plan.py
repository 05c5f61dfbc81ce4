"""The launch plan of the kernel for cached top-k teachers."""

from __future__ import annotations

from dataclasses import dataclass

import triton

#: Outcomes of a row, k rounded up to a power of two, that a kernel compares in all pairs.
MOST_COMPARED = 128


@dataclass(frozen=True)
class TopKPlan:
    """What one launch looks like.

    Attributes:
        block: Classes read at a time.
        wide: Lanes for the k outcomes, a power of two.
        num_warps: Warps a program.
        once: Whether the kernel looks for classes that are named twice, all pairs of lanes at once.
    """

    block: int
    wide: int
    num_warps: int
    once: bool


def topk_plan(num_classes: int, k: int) -> TopKPlan:
    """One row a program, 16 classes a thread at a time.

    Longer rows than 16384 take 16 warps: three programs a multiprocessor, whose rows wait in the cache for their second
    read (25 MB of an H100's 50 at 32000 classes in half precision, for 42 MB by five programs of 8 warps).
    """
    most = 8192 if num_classes > 16384 else 4096
    block = min(most, max(32, triton.next_power_of_2(num_classes)))
    wide = max(2, triton.next_power_of_2(k))
    return TopKPlan(block, wide, max(1, block // 512), once=k > 1 and wide <= MOST_COMPARED)
