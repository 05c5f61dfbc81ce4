"""What the launchers of the feature family share: plans, walks and the constants of a launch."""

from __future__ import annotations

import functools

from ..common.plan import BlockPlan
from ..common.strided import Strides, Walk, contiguous, iteration_order, walk


def mix_plan(numel: int) -> BlockPlan:
    """Eight elements a thread, so that 16-bit features move 16 bytes a load; ``numel`` of one sample."""
    return BlockPlan(1024, 4) if numel >= 4096 else BlockPlan(256, 1)


@functools.lru_cache(maxsize=1024)
def walked(
    shape: tuple[int, ...], strides: tuple[Strides | None, ...], noise: bool
) -> tuple[Walk, tuple[Strides | None, ...], Strides | None, bool]:
    """One walk over all operands (the first decides the order): it, their strides, E's, and whether E runs."""
    operands = [own for own in strides if own is not None]
    every = [*operands, contiguous(shape)] if noise else operands
    plan = walk(shape, iteration_order(shape, operands[0]), tuple(every), aligned=8)
    found = iter(plan.strides)
    walked = tuple(next(found) if own is not None else None for own in strides)
    element = plan.strides[-1] if noise else None
    # Four neighbours share a Philox counter where a block holds whole groups of them.
    run = element is not None and plan.rows and element[0] == 1 and not any(s % 4 for s in element[1:])
    return plan, walked, element, run
