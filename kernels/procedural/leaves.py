"""Dead leaves: shapes that fall on an image one by one until no pixel is bare, without painting any.

    stop = max over pixels p of (first leaf on p),   colour(p) = colour of the last leaf on p that is not after stop

which is painter's order exactly (kdfast/reference/procedural/leaves.py, where the leaves' shapes and law are). Three
launches:

    draw     leaf j of image i from Philox at the counters (j, i, 0 … 2): 16 numbers a leaf
    stop     each tile walks the leaves from the first on until it has no bare pixel; atomic maximum of where it ended
    colour   each tile walks back from there until each of its pixels has met a leaf

Bytes moved: 64 a leaf written once and then read from cache (5000 leaves: 320 kB an image), 3 a pixel written once.
Tests decide. A tile first compares a leaf's circle with itself, in scalars: with p(r) ∝ r⁻³ − 1 most leaves are small
and end there. What is left are some tens of tests a pixel each way.

Launch plan: one warp a tile of 16 × 16 pixels, so that "is any pixel bare?" is a shuffle and no barrier. Bits are the
reference's: no contraction to fused multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launch import device_guard, launch
from .arithmetic import wave

#: Numbers a leaf: centre, squared radius, four half-planes (A, B, C), colour as 0xRRGGBB.
FIELDS = 16
_FIELDS = tl.constexpr(16)
_BINS = tl.constexpr(200)


@dataclass(frozen=True)
class LeafPlan:
    """A tile's sides in pixels, the leaves that a program of `draw` makes, and warps."""

    tile_height: int
    tile_width: int
    draws: int
    num_warps: int


def leaf_plan() -> LeafPlan:
    """Eight pixels a thread of one warp: wide enough to keep the scalar tests of a leaf in the shade."""
    return LeafPlan(16, 16, 128, 4)


@triton.jit
def _uniform(word):
    """32 random bits as a number in [0, 1) with 24 bits."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _radius(u, radii, law):
    """The radius of the bin that ``u`` falls in: as many bins up as have a cumulative probability of at most u."""
    bins = tl.zeros_like(u).to(tl.int32)
    for power in tl.static_range(8):
        probe = bins + (128 >> power)
        inside = probe <= _BINS
        reached = tl.load(law + tl.minimum(probe, _BINS) - 1) <= u
        bins = tl.where(inside & reached, probe, bins)
    return tl.load(radii + tl.minimum(bins, _BINS - 1))


@triton.jit
def _corner(kind, angle, half, start, jitter, third, K: tl.constexpr):
    """Where on its circle corner K lies, in turns."""
    if K == 0:
        box = start - half
    elif K == 1:
        box = start + half
    elif K == 2:
        box = start + (0.5 - half)
    else:
        box = start + (0.5 + half)
    free = angle + (K * 1.0 + 0.8 * jitter) * 0.25
    return tl.where(kind < 4, box, tl.where(kind == 4, third, free))


@triton.jit
def _side(to, kind, x, y, next_x, next_y, mask):
    across, up = next_x - x, next_y - y
    none = (kind == 0) | ((across == 0) & (up == 0))
    tl.store(to, tl.where(none, 0.0, -up), mask)
    tl.store(to + 1, tl.where(none, 0.0, across), mask)
    tl.store(to + 2, tl.where(none, 1.0, up * x - across * y), mask)


@triton.jit
def leaves_draw_kernel(index, radii, law, out, seed, limit, height, width, shorter, BLOCK: tl.constexpr):
    """One leaf a lane: its shape, place and colour from three Philox blocks."""
    blocks = tl.cdiv(limit, BLOCK)
    image = tl.program_id(0) // blocks
    leaf = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = leaf < limit
    number = tl.load(index + image)
    c0, zero = leaf.to(tl.uint32), tl.zeros([BLOCK], tl.uint32)
    c1, c2 = zero + (number & 0xFFFFFFFF).to(tl.uint32), zero + ((number >> 32) & 0xFFFFFFFF).to(tl.uint32)
    which, size, across, down = tl.philox(seed, c0, c1, c2, zero)
    colour, angle, aspect, _ = tl.philox(seed, c0, c1, c2, zero + 1)
    j0, j1, j2, j3 = tl.philox(seed, c0, c1, c2, zero + 2)
    kind = ((which.to(tl.uint64) * 6) >> 32).to(tl.int32)
    angle = _uniform(angle)
    j0, j1, j2, j3 = _uniform(j0), _uniform(j1), _uniform(j2), _uniform(j3)
    radius = _radius(_uniform(size), radii, law) * shorter
    half = tl.where(kind == 3, 0.03 + 0.19 * _uniform(aspect), 0.125)
    start = tl.where(kind == 1, 0.0, angle)
    third = 0.3333333333333333
    t0 = angle + (0.0 + 0.8 * j0) * third
    t1 = angle + (1.0 + 0.8 * j1) * third
    t2 = angle + (2.0 + 0.8 * j2) * third
    a0 = _corner(kind, angle, half, start, j0, t0, 0)
    a1 = _corner(kind, angle, half, start, j1, t1, 1)
    a2 = _corner(kind, angle, half, start, j2, t2, 2)
    a3 = _corner(kind, angle, half, start, j3, t2, 3)
    x0, y0 = wave(a0 + 0.25) * radius, wave(a0) * radius
    x1, y1 = wave(a1 + 0.25) * radius, wave(a1) * radius
    x2, y2 = wave(a2 + 0.25) * radius, wave(a2) * radius
    x3, y3 = wave(a3 + 0.25) * radius, wave(a3) * radius
    to = out + (image.to(tl.int64) * limit + leaf) * _FIELDS
    tl.store(to, _uniform(across) * width, mask)
    tl.store(to + 1, _uniform(down) * height, mask)
    tl.store(to + 2, radius * radius, mask)
    _side(to + 3, kind, x0, y0, x1, y1, mask)
    _side(to + 6, kind, x1, y1, x2, y2, mask)
    _side(to + 9, kind, x2, y2, x3, y3, mask)
    _side(to + 12, kind, x3, y3, x0, y0, mask)
    tl.store(to + 15, (colour >> 8).to(tl.float32), mask)


@triton.jit
def _near(leaf, left, top, WIDTH: tl.constexpr, HEIGHT: tl.constexpr):
    """Whether a leaf's circle may reach into the tile; in scalars, and generous."""
    dx, dy = tl.load(leaf) - left, tl.load(leaf + 1) - top
    dx = tl.maximum(tl.maximum(-dx, dx - WIDTH), 0.0)
    dy = tl.maximum(tl.maximum(-dy, dy - HEIGHT), 0.0)
    return dx * dx + dy * dy <= tl.load(leaf + 2) * 1.01 + 1.0


@triton.jit
def _on(leaf, x, y):
    """Which pixels a leaf is on."""
    dx, dy = x - tl.load(leaf), y - tl.load(leaf + 1)
    inside = dx * dx + dy * dy <= tl.load(leaf + 2)
    for k in tl.static_range(3, 15, 3):
        inside &= tl.load(leaf + k) * dx + tl.load(leaf + k + 1) * dy + tl.load(leaf + k + 2) >= 0
    return inside


@triton.jit
def _tile(height, width, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """This program's image, the tile's corner, and its pixels' rows, columns and whether they exist."""
    across = tl.cdiv(width, WIDTH)
    tiles = across * tl.cdiv(height, HEIGHT)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    top, left = (tile // across) * HEIGHT, (tile % across) * WIDTH
    lane = tl.arange(0, HEIGHT * WIDTH)
    row, column = top + lane // WIDTH, left + lane % WIDTH
    return image, top, left, row, column, (row < height) & (column < width)


@triton.jit
def leaves_stop_kernel(table, stop, height, width, limit, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """How many leaves fall until this tile, and so at last the image, has no bare pixel."""
    image, top, left, row, column, exists = _tile(height, width, HEIGHT, WIDTH)
    x, y = column.to(tl.float32) + 0.5, row.to(tl.float32) + 0.5
    left_edge, top_edge = left.to(tl.float32), top.to(tl.float32)
    leaf = table + image.to(tl.int64) * limit * _FIELDS
    bare = exists.to(tl.int32)
    more, done = 1, 0
    while (more > 0) & (done < limit):
        if _near(leaf, left_edge, top_edge, WIDTH, HEIGHT):
            bare = tl.where(_on(leaf, x, y), 0, bare)
            more = tl.max(bare, 0)
        leaf += _FIELDS
        done += 1
    tl.atomic_max(stop + image, done, sem="relaxed")


@triton.jit
def leaves_colour_kernel(table, stop, out, height, width, limit, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The colour of each pixel: of the last leaf on it among those that fell."""
    image, top, left, row, column, exists = _tile(height, width, HEIGHT, WIDTH)
    x, y = column.to(tl.float32) + 0.5, row.to(tl.float32) + 0.5
    left_edge, top_edge = left.to(tl.float32), top.to(tl.float32)
    after = tl.load(stop + image)
    leaf = table + (image.to(tl.int64) * limit + after) * _FIELDS
    open_, colour = exists.to(tl.int32), tl.zeros_like(row)
    more = 1
    while (more > 0) & (after > 0):
        leaf -= _FIELDS
        after -= 1
        if _near(leaf, left_edge, top_edge, WIDTH, HEIGHT):
            hit = _on(leaf, x, y)
            colour = tl.where(hit & (open_ > 0), tl.load(leaf + 15).to(tl.int32), colour)
            open_ = tl.where(hit, 0, open_)
            more = tl.max(open_, 0)
    pixels = tl.cast(height, tl.int64) * width
    to = out + image.to(tl.int64) * 3 * pixels + row * width + column
    for channel in tl.static_range(3):
        tl.store(to + channel * pixels, ((colour >> (16 - 8 * channel)) & 255).to(tl.uint8), exists)


def render(
    index: torch.Tensor,
    radii: torch.Tensor,
    law: torch.Tensor,
    seed: int,
    height: int,
    width: int,
    limit: int,
) -> torch.Tensor:
    """Render a batch in three launches: uint8 ``[B, 3, H, W]``.

    Args:
        index: int64 ``[B]``, contiguous.
        radii: float32 ``[200]``: the radii, as shares of the shorter side.
        law: float32 ``[200]``: their cumulative probabilities.
        seed: Philox's key.
        height: In pixels.
        width: In pixels.
        limit: Leaves an image at most.
    """
    batch, plan = index.shape[0], leaf_plan()
    out = index.new_empty((batch, 3, height, width), dtype=torch.uint8)
    table = index.new_empty((batch, limit, FIELDS), dtype=torch.float32)
    stop = index.new_zeros(batch, dtype=torch.int32)
    tiles = -(-height // plan.tile_height) * -(-width // plan.tile_width)
    sides = {"HEIGHT": plan.tile_height, "WIDTH": plan.tile_width, "num_warps": 1}
    with device_guard(index):
        launch(
            leaves_draw_kernel,
            (batch * -(-limit // plan.draws),),
            *(index, radii, law, table, seed, limit),
            *(float(height), float(width), float(min(height, width))),
            BLOCK=plan.draws,
            num_warps=plan.num_warps,
            enable_fp_fusion=False,
        )
        shape = (height, width, limit)
        launch(leaves_stop_kernel, (batch * tiles,), table, stop, *shape, **sides, enable_fp_fusion=False)
        launch(
            leaves_colour_kernel, (batch * tiles,), table, stop, out, *shape, **sides, enable_fp_fusion=False
        )
    return out
