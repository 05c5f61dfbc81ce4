"""Blocks of tensors whose elements are numbered across their memory, as channels_last is: tiles of [channel, position].

Neighbours in the numbering are positions of one channel, neighbours in memory channels of one position. A program draws
its normals in the order of the numbering, four to a Philox counter, and hands them over in the order of memory through
shared memory (``tl.gather``), so that both are cheap. Which normal an element has does not depend on it.

TILE, from feature/plan.py:

    channels, positions         of the whole dimensions
    C, P                        of a program's tile
    RUN                         channels numbered without a gap between: all C where P is all there are, or 1
    GROUPS                      Philox counters a run
    ALIGNED                     whether each run begins a group of four
    VECTOR                      channels that a thread reads at once
"""

from __future__ import annotations

import triton
import triton.language as tl

from .normal import normals_of_groups
from .walk import outer_coordinates


@triton.jit
def _lanes(TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Channel and position of each lane within the tile: ``[BLOCK // VECTOR, VECTOR]`` and ``[BLOCK // VECTOR, 1]``."""
    VECTOR: tl.constexpr = TILE[7]
    vectors: tl.constexpr = TILE[2] // VECTOR
    own = tl.arange(0, BLOCK // VECTOR)[:, None]
    return own % vectors * VECTOR + tl.arange(0, VECTOR)[None, :], own // vectors


@triton.jit
def locate_across(
    SIZES: tl.constexpr, NDIM: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """This program's tile: live lanes, first channel and position, coordinates (channel and position come first)."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    across: tl.constexpr = (TILE[0] + TILE[2] - 1) // TILE[2]
    along: tl.constexpr = (TILE[1] + TILE[3] - 1) // TILE[3]
    rest = pid // across
    channel, position = pid % across * TILE[2], rest % along * TILE[3]
    lane, place = _lanes(TILE, BLOCK)
    c0, c1 = channel + lane, position + place
    live = (c0 < TILE[0]) & (c1 < TILE[1]) & (place < TILE[3])
    c2, c3, c4, c5 = outer_coordinates(rest // along, SIZES, NDIM)
    return live, channel, position, c0, c1, c2, c3, c4, c5


@triton.jit
def normal_across(seed, step, first, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The normals of a tile whose corner is element ``first``."""
    RUN: tl.constexpr = TILE[4]
    GROUPS: tl.constexpr = TILE[5]
    length: tl.constexpr = RUN * TILE[1]  # elements from one run to the next
    own = tl.arange(0, BLOCK // 4)
    begin = first + (own // GROUPS).to(first.dtype) * length
    normals = normals_of_groups(seed, step, (begin >> 2) + own % GROUPS, BLOCK)
    lane, place = _lanes(TILE, BLOCK)
    at = lane // RUN * (4 * GROUPS) + lane % RUN * TILE[1] + place
    if not TILE[6]:
        at += ((first & 3).to(tl.int32) + lane // RUN * (length % 4)) & 3
    at = tl.where((place < TILE[3]) & (lane < TILE[2]), at, 0)
    return tl.reshape(tl.gather(normals, tl.reshape(at, [BLOCK]), 0), [BLOCK // TILE[7], TILE[7]])
