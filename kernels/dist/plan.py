"""The launch plan of the DIST kernels."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from ..common.plan import TilePlan
from ..common.tile import ONE_ROW, few_classes

#: A row pair up to this many classes stays in registers.
MAX_ROW = 8192
#: Tiles that the column kernel reads at a turn, so that the loads of all are on their way together.
TURNS = 2
#: Splits that are merged at a time.
MERGED = 32


@dataclass(frozen=True)
class DistPlan:
    """What the launches look like.

    Attributes:
        rows: Rows of a program of the row and gradient kernels.
        block: Classes they read at a time.
        tile_rows: Rows that a program of the column kernel reads at a turn, in TURNS tiles.
        columns: Its columns.
        splits: Programs that share a group of columns, each taking a stretch of rows.
        rows_per_split: The length of that stretch.
        merged: Splits that are merged at a time.
        num_warps: Warps a program, of every kernel but a tile's.
        tile: Rows in registers, of the row kernel; None where they are read twice.
    """

    rows: int
    block: int
    tile_rows: int
    columns: int
    splits: int
    rows_per_split: int
    merged: int
    num_warps: int
    tile: TilePlan | None


def _tile(num_classes: int, itemsize: int) -> TilePlan | None:
    """Sixteen classes a thread, in a warp of its own up to 1024 of them, in one program beyond."""
    padded = triton.next_power_of_2(num_classes)
    if padded > MAX_ROW:
        return None
    if padded > 1024:
        return TilePlan("rows", ONE_ROW, padded, 1, 1, padded // 512)
    return few_classes(num_classes, itemsize)


def dist_plan(num_rows: int, num_classes: int, itemsize: int) -> DistPlan:
    """Tiles of about 2048 elements; the columns' rows are split until some 512 programs are busy."""
    block = min(2048, max(16, triton.next_power_of_2(num_classes)))
    columns = min(64, block)
    tile_rows = 2048 // columns
    wanted = max(1, 512 // triton.cdiv(num_classes, columns))
    splits = max(1, min(wanted, triton.cdiv(num_rows, 4 * tile_rows)))
    rows_per_split = triton.cdiv(num_rows, splits)
    splits = triton.cdiv(num_rows, rows_per_split)
    return DistPlan(
        max(1, 2048 // block),
        block,
        tile_rows,
        columns,
        splits,
        rows_per_split,
        min(MERGED, triton.next_power_of_2(splits)),
        4,
        _tile(num_classes, itemsize),
    )
