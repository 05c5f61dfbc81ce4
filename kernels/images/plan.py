"""The launch plan of crop, flip and normalise."""

from __future__ import annotations

from ..common.plan import BlockPlan


def images_plan(numel: int) -> BlockPlan:
    """Eight elements a thread, so that 16-bit results are stored 16 bytes wide; ``numel`` of one sample."""
    return BlockPlan(1024, 4) if numel >= 2048 else BlockPlan(256, 1)
