"""Tiles of rows: how their dimensions are ordered, which rows a program's tile holds, and what runs along them.

A tile's dimensions are used in one of four orders; the class dimension is what is summed out:

    0  [chunk, row, lane]   classes = chunk·WIDTH + lane
    1  [row, chunk, lane]   the same, in the order that Triton 3.6 compiles well
    2  [class, pixel]       class dimension 1 of [B, C, H, W], vectorised along pixels
    3  [class]              one row a program
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..machine import triton_version
from .layout import RowLayout
from .plan import TilePlan
from .reduce import reduce_last

# The orders, for launch plans.
CHUNK_ROW_LANE, ROW_CHUNK_LANE, CLASS_PIXEL, ONE_ROW = range(4)


def few_classes(num_classes: int, itemsize: int, wide: int = 32) -> TilePlan:
    """Rows of at most 1024 classes that lie side by side, several a program.

    Args:
        num_classes: V.
        itemsize: Bytes of the widest element.
        wide: Lanes of a row of more than 512 classes, up to 64: a warp keeps all its sums to itself, two have half the
            classes a thread.
    """
    padded = max(2, triton.next_power_of_2(num_classes))
    vector = 16 // itemsize
    while vector > 2 and num_classes % vector:  # a pair at least: single lanes compile badly
        vector //= 2
    lanes = wide if padded > 512 else min(32, max(1, padded // 16))
    width = min(padded, lanes * vector)
    order = ROW_CHUNK_LANE if triton_version() < (3, 7) else CHUNK_ROW_LANE
    return TilePlan("rows", order, padded // width, 128 // lanes, width, 4)


def tile_grid(plan: TilePlan, layout: RowLayout) -> tuple[int]:
    """The programs: none has pixels of two images."""
    if plan.layout == CLASS_PIXEL:
        return (layout.outer * triton.cdiv(layout.inner, plan.rows),)
    return (triton.cdiv(layout.outer * layout.inner, plan.rows),)


def tile_sizes(plan: TilePlan, layout: RowLayout) -> dict[str, int | bool]:
    """The arguments of a kernel that calls :func:`tile_rows`."""
    sizes = {"LAYOUT": plan.layout, "CHUNKS": plan.chunks, "ROWS": plan.rows, "WIDTH": plan.width}
    return sizes | {"INNER_ONE": layout.inner == 1}


@triton.jit
def over_classes(x, LAYOUT: tl.constexpr, MAX: tl.constexpr):
    """Reduce a tile over its class dimension(s) to one value a row."""
    if LAYOUT == 0:
        out = tl.max(tl.max(x, axis=0), axis=1) if MAX else tl.sum(tl.sum(x, axis=0), axis=1)
    elif LAYOUT == 1:
        out = tl.max(tl.max(x, axis=1), axis=1) if MAX else tl.sum(tl.sum(x, axis=1), axis=1)
    else:
        out = tl.max(x, axis=0) if MAX else tl.sum(x, axis=0)
    return out


@triton.jit
def per_row(v, LAYOUT: tl.constexpr):
    """Broadcast one value a row over the tile."""
    if LAYOUT == 0:
        out = v[None, :, None]
    elif LAYOUT == 1:
        out = v[:, None, None]
    elif LAYOUT == 2:
        out = v[None, :]
    else:
        out = v
    return out


@triton.jit
def pixel_rows(inner, PIXELS: tl.constexpr):
    """(rows, valid, outer, within) of a program that has PIXELS neighbours along ``inner``."""
    tiles = tl.cdiv(inner, PIXELS)
    outer = tl.program_id(0) // tiles
    within = (tl.program_id(0) % tiles) * PIXELS + tl.arange(0, PIXELS)
    return outer * inner + within, within < inner, outer, within


@triton.jit
def tile_rows(num_rows, inner, LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
              INNER_ONE: tl.constexpr):  # fmt: skip
    """(rows, valid, outer, within, classes) of this program's tile; row = outer·inner + within."""
    pid = tl.program_id(0)
    if LAYOUT == 3:
        rows = pid
        outer, within = rows // inner, rows % inner
        valid = rows < num_rows
        classes = tl.arange(0, CHUNKS)
    elif LAYOUT == 2:
        rows, valid, outer, within = pixel_rows(inner, ROWS)
        classes = tl.cast(tl.arange(0, CHUNKS)[:, None], tl.int64)
    else:
        rows = pid * ROWS + tl.arange(0, ROWS)
        if INNER_ONE:
            outer, within = rows, rows * 0
        else:
            outer, within = rows // inner, rows % inner
        valid = rows < num_rows
        if LAYOUT == 0:
            classes = tl.arange(0, CHUNKS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
        else:
            classes = tl.arange(0, CHUNKS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return rows, valid, outer, within, classes


@triton.jit
def tile_at(outer, within, classes, outer_stride, inner_stride, class_stride, LAYOUT: tl.constexpr):
    """Where a tile's elements lie, in elements from the tensor's first.

    In 64 bits: classes that lie across are as far apart as an image is large.
    """
    at = per_row(outer * outer_stride + within * inner_stride, LAYOUT)
    return at + classes.to(tl.int64) * class_stride


@triton.jit
def store_losses(loss, rows, valid, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
                 STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr, ONE: tl.constexpr):  # fmt: skip
    """The rows' losses and their sum, whichever is wanted; ONE: the program has a single row, a scalar."""
    if STORE_ROWS:
        tl.store(rows_ptr + rows, loss, mask=valid)
    if REDUCE:
        if ONE:
            reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
        else:
            reduce_last(tl.sum(loss, axis=0), loss_ptr, partial_ptr, counter_ptr, 2048)
