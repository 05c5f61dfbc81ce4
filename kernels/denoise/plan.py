"""The launch plan of the denoising step."""

from __future__ import annotations

from ..common.plan import BlockPlan

#: Where a program of few elements is better: below this many, small blocks fill more multiprocessors.
SMALL = 1 << 18


def step_plan(numel: int) -> BlockPlan:
    """Eight elements a thread; one warp a program while the whole tensor is small."""
    return BlockPlan(1024, 4) if numel >= SMALL else BlockPlan(256, 1)
