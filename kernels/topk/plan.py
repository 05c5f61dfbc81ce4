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
    """One row a program: at most 4096 classes at a time, 16 a thread."""
    block = min(4096, max(32, triton.next_power_of_2(num_classes)))
    wide = max(2, triton.next_power_of_2(k))
    return TopKPlan(block, wide, min(8, max(1, block // 512)), once=k > 1 and wide <= MOST_COMPARED)
