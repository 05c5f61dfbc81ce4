"""What the launchers of the feature family share: plans, walks and the constants of a launch."""

from __future__ import annotations

import functools
import math
from typing import Any

from ..common.plan import BlockPlan
from ..common.strided import Strides, Walk, contiguous, iteration_order, walk, walk_blocks


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


#: Of a tile (common/across.py).
Tile = tuple[int, int, int, int, int, int, bool, int]
#: Channels that lie together in memory fill at least a sector of it, where there are as many.
_FEWEST = 16


def _tiles(channels: int, positions: int, aligned: bool, block: int) -> list[Tile]:
    """The tiles of at most ``block`` elements, ``aligned`` says whether samples begin groups of four."""
    vector = math.gcd(channels, 8)
    fewest = min(channels, _FEWEST)
    found: list[Tile] = []
    for across in range(vector, min(channels, block) + 1, vector):
        if across < fewest:
            continue
        whole = aligned and across * positions % 4 == 0
        groups = -(-(across * positions + (0 if whole else 3)) // 4)
        if 4 * groups <= block:
            found.append((channels, positions, across, positions, across, groups, whole, vector))
        every = aligned and positions % 4 == 0
        groups = min(block // 4 // across, -(-(positions + (0 if every else 3)) // 4))
        along = min(positions, 4 * (groups if every else groups - 1))
        if along > 0:
            found.append((channels, positions, across, along, 1, groups, every, vector))
    return found


def tile_programs(tile: Tile) -> int:
    """Programs of one sample."""
    return -(-tile[0] // tile[2]) * -(-tile[1] // tile[3])


@functools.lru_cache(maxsize=1024)
def tile_of(channels: int, positions: int, aligned: bool, block: int) -> Tile | None:
    """The tile that takes fewest programs (of these the widest in memory); None where none fits."""

    def cost(tile: Tile) -> tuple[int, int]:
        return tile_programs(tile), -tile[2]

    return min(_tiles(channels, positions, aligned, block), key=cost, default=None)


def across_plan(chosen: BlockPlan, numel: int) -> BlockPlan:
    """Twice the elements a thread: an odd number of positions then fills a tile of whole channels."""
    return BlockPlan(2 * chosen.block, chosen.num_warps) if numel >= 1 << 14 else chosen


def noisy_blocks(
    plan: Walk, element: Strides | None, run: bool, chosen: BlockPlan, across: BlockPlan, sample: int = 0
) -> tuple[int, dict[str, Any]]:
    """As :func:`walk_blocks`, with how a kernel draws the normals of its blocks.

    NOISE_RUN: elements are numbered as they lie in memory, TILE: across it; neither: each draws its own, at four times
    the work.

    Args:
        plan: The walk.
        element: Strides of the numbering, or None: nothing is drawn.
        run: Whether it runs along the innermost dimension, groups of four together.
        chosen: The blocks.
        across: Those of a TILE.
        sample: What the numbering begins at a multiple of.
    """
    if element is not None and not run and plan.ndim > 1 and element[1] == 1:
        channels = plan.inner
        positions = plan.numel // channels if plan.ndim == 2 else plan.sizes[1]
        aligned = not any(step % 4 for step in (*element[2:], sample))
        tile = tile_of(channels, positions, aligned, across.block) if element[0] == positions else None
        if tile is not None:
            programs = plan.numel // (channels * positions) * tile_programs(tile)
            _, constants = walk_blocks(plan, across)
            return programs, constants | {"E": element, "NOISE_RUN": False, "TILE": tile}
    programs, constants = walk_blocks(plan, chosen)
    return programs, constants | {"E": element, "NOISE_RUN": run, "TILE": None}
