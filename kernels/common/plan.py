"""What the families' launch plans have in common."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockPlan:
    """A launch over elements in a row: elements a program, and its warps."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class TilePlan:
    """A launch over tiles of rows (tile.py).

    Attributes:
        regime: The family's name for the kernel and its way of reading.
        layout: The tile's order, one of the constants of tile.py.
        chunks: Classes a lane group steps over; ``chunks * width`` ≥ V (where rows are read block by block: a block).
        rows: Rows (or pixels) a program handles.
        width: Neighbouring classes handled together by one row's lanes.
        num_warps: Warps a program.
        registers: A thread may have at most; 0: as the compiler likes.
    """

    regime: str
    layout: int
    chunks: int
    rows: int
    width: int
    num_warps: int
    registers: int = 0
