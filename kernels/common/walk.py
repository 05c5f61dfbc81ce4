"""Where a program's block lies in tensors that are walked in one order; the walk itself: strided.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _coordinate(rest, SIZE: tl.constexpr, AT: tl.constexpr, NDIM: tl.constexpr):
    """Coordinate ``AT`` of what is left of a linear index; the outermost needs no division."""
    if AT == NDIM - 1:
        return rest
    else:
        return rest % SIZE


@triton.jit
def outer_coordinates(rest, SIZES: tl.constexpr, NDIM: tl.constexpr):
    """Coordinates 2 to 5 of what is left of a linear index."""
    c2 = _coordinate(rest, SIZES[2], 2, NDIM)
    rest3 = rest // SIZES[2]
    c3 = _coordinate(rest3, SIZES[3], 3, NDIM)
    rest4 = rest3 // SIZES[3]
    c4 = _coordinate(rest4, SIZES[4], 4, NDIM)
    return c2, c3, c4, rest4 // SIZES[4]


@triton.jit
def locate(
    numel, inner,
    SIZES: tl.constexpr, NDIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's block: linear index of its start, live lanes, innermost start, coordinates."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    if ROWS:
        blocks = tl.cdiv(inner, BLOCK)
        rest = pid // blocks
        column = (pid - rest * blocks) * BLOCK
        start = rest * inner + column
        c0 = column + lanes
        live = c0 < inner
    else:
        start = pid * BLOCK
        column = start * 0
        index = start + lanes
        live = index < numel
        c0 = _coordinate(index, SIZES[0], 0, NDIM)
        rest = index // SIZES[0]
    c1 = _coordinate(rest, SIZES[1], 1, NDIM)
    c2, c3, c4, c5 = outer_coordinates(rest // SIZES[1], SIZES, NDIM)
    return start, live, column, c0, c1, c2, c3, c4, c5


@triton.jit
def offset_of(c0, c1, c2, c3, c4, c5, S: tl.constexpr, NDIM: tl.constexpr):
    """Element offset in a tensor with strides ``S``, innermost first."""
    offset = c0 * S[0]
    if NDIM > 1:
        offset = c1 * S[1] + offset
    if NDIM > 2:
        offset = c2 * S[2] + offset
    if NDIM > 3:
        offset = c3 * S[3] + offset
    if NDIM > 4:
        offset = c4 * S[4] + offset
    if NDIM > 5:
        offset = c5 * S[5] + offset
    return offset


@triton.jit
def window(c, lanes, C: tl.constexpr, SPAN: tl.constexpr):
    """Channels' SPAN values, read from 8 elements' boundary on: offsets, lanes to load, lanes that count."""
    first = (c * SPAN) // 8 * 8
    at = first[:, None] + lanes[None, :]
    ahead = at - (c * SPAN)[:, None]
    known = (c < C)[:, None]
    return at, known & (at < C * SPAN), known & (ahead >= 0) & (ahead < SPAN)
