"""Walk tensors of equal shape and any strides in one common order, with as few dimensions as possible."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .plan import BlockPlan

#: Dimensions that a kernel can tell apart after merging.
MAX_DIMS = 6

Strides = tuple[int, ...]


@dataclass(frozen=True)
class Walk:
    """The common iteration order of some tensors.

    Attributes:
        numel: Elements in all.
        inner: Elements of the innermost (merged) dimension.
        ndim: Dimensions left after merging.
        rows: Whether every tensor is dense along the innermost dimension, so that blocks of one row are
            addressed by a scalar base plus 0, 1, 2, …; otherwise each element finds its own coordinates.
        sizes: Sizes, innermost first; those that a kernel does not need (the outermost, and with ``rows``
            the innermost) are 1, so that a new batch size compiles nothing new.
        strides: Per tensor, innermost first, padded with 0 to :data:`MAX_DIMS`.
        pinned: Position of the dimension that was to stay apart, or -1.
        wide: Whether offsets need 64 bits.
    """

    numel: int
    inner: int
    ndim: int
    rows: bool
    sizes: tuple[int, ...]
    strides: tuple[Strides, ...]
    pinned: int
    wide: bool


def contiguous(shape: Sequence[int]) -> Strides:
    """Strides of a dense row-major tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def iteration_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Dimensions from the outermost to the innermost in memory; ties keep their place."""
    return tuple(sorted(range(len(shape)), key=lambda dim: (-strides[dim], -shape[dim], dim)))


@functools.lru_cache(maxsize=1024)
def walk(
    shape: tuple[int, ...],
    order: tuple[int, ...],
    strides: tuple[Strides, ...],
    *,
    pinned: int = -1,
    aligned: int = 1,
    min_row: int = 128,
) -> Walk:
    """Merge neighbouring dimensions wherever every tensor allows it.

    Args:
        shape: The common shape.
        order: Its dimensions from the outermost to the innermost.
        strides: One tuple for each tensor, in elements.
        pinned: A dimension that must not be merged, or -1.
        aligned: Rows are used only if this divides their length (or there is one row).
        min_row: Shorter rows would leave most of a block idle.
    """
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    pinned_at = -1
    for dim in reversed(order):
        if dim == pinned:
            pinned_at = len(sizes)
        elif shape[dim] == 1:
            continue
        joins = (
            sizes
            and pinned_at not in (len(sizes), len(sizes) - 1)
            and all(own[dim] == known[-1] * sizes[-1] for own, known in zip(strides, merged, strict=True))
        )
        if joins:
            sizes[-1] *= shape[dim]
            continue
        sizes.append(shape[dim])
        for own, known in zip(strides, merged, strict=True):
            known.append(own[dim])
    if not sizes:
        sizes = [1]
        merged = [[1] for _ in strides]
    if len(sizes) > MAX_DIMS:
        raise ValueError(
            f"tensors of shape {shape} keep {len(sizes)} dimensions apart; at most {MAX_DIMS} can be"
        )
    dense = all(known[0] in (0, 1) for known in merged)
    rows = dense and pinned_at != 0 and (len(sizes) == 1 or (sizes[0] >= min_row and sizes[0] % aligned == 0))
    reach = max(sum(abs(s) * (n - 1) for s, n in zip(known, sizes, strict=True)) for known in merged)
    kept = [1 if at == len(sizes) - 1 or (rows and at == 0) else size for at, size in enumerate(sizes)]

    def pad(values: Sequence[int], filler: int) -> tuple[int, ...]:
        return (*values, *([filler] * (MAX_DIMS - len(values))))

    return Walk(
        numel=math.prod(shape),
        inner=sizes[0],
        ndim=len(sizes),
        rows=rows,
        sizes=pad(kept, 1),
        strides=tuple(pad(known, 0) for known in merged),
        pinned=pinned_at,
        wide=max(reach, math.prod(shape)) >= 2**31 - 2**16,
    )


def walk_blocks(plan: Walk, chosen: BlockPlan) -> tuple[int, dict[str, Any]]:
    """Programs of one walk, and the constants of a kernel that walks (walk.py)."""
    rows, length = (plan.numel // plan.inner, plan.inner) if plan.rows else (1, plan.numel)
    constants = {
        "SIZES": plan.sizes,
        "NDIM": plan.ndim,
        "ROWS": plan.rows,
        "WIDE": plan.wide,
        "BLOCK": chosen.block,
        "num_warps": chosen.num_warps,
        "enable_fp_fusion": True,
    }
    return rows * -(-length // chosen.block), constants
