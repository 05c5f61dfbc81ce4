"""How x lies in memory, and the tiles that the batch-norm kernels cut it into; what for: norm.py."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

#: Elements of a tile: 8 a thread of four warps.
TILE = 1024
#: Below this many elements one warp takes 256 of them, so that more multiprocessors have something to do.
SMALL = 1 << 17
#: Parts that a channel is split in at most, which the last program reads back at once.
MAX_PARTS = 64


class Matrix(NamedTuple):
    """How x lies in memory: ``rows`` × ``channels·span`` values, a channel's ``span`` neighbours each."""

    rows: int
    channels: int
    span: int

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.channels * self.span

    @property
    def numel(self) -> int:
        """All values."""
        return self.rows * self.width

    @property
    def count(self) -> int:
        """Values of a channel."""
        return self.rows * self.span

    @property
    def wide(self) -> bool:
        """Whether offsets need 64 bits."""
        return self.numel >= 2**31 - 2**16


def matrix(x: torch.Tensor) -> Matrix | None:
    """The matrix that ``x`` ``[B, C, …]`` is, or None where it has to be copied first."""
    return _matrix(x.shape, x.stride())


@functools.lru_cache(maxsize=512)
def _matrix(shape: torch.Size, strides: tuple[int, ...]) -> Matrix | None:
    x = torch.empty_strided(shape, strides, device="meta")
    batch, channels = shape[:2]
    span = math.prod(shape[2:])
    if span > 1 and x.is_contiguous():
        return Matrix(batch, channels, span)
    if x.movedim(1, -1).is_contiguous():
        return Matrix(batch * span, channels, 1)
    return None


@dataclass(frozen=True)
class ReducePlan:
    """Channels and positions of a tile, tiles in all, tiles a program, programs a channel block."""

    channels: int
    positions: int
    window: bool
    steps: int
    per: int
    parts: int
    num_warps: int


@functools.lru_cache(maxsize=1024)
def reduce_plan(m: Matrix) -> ReducePlan:
    """Tiles of 1024 with wide loads; enough programs for a large GPU, 64 a channel block at most."""
    size, warps = (TILE, 4) if m.numel >= SMALL else (256, 1)
    window, most = False, MAX_PARTS
    if m.span == 1:
        # The last program holds parts x channels partial sums: 2048 leave the registers for eight programs a
        # multiprocessor. 16 channels are a sector of 32 bytes.
        channels = min(next_power(m.channels), 16 if m.channels < 512 else 32 if m.channels < 2048 else 64)
        positions = size // channels
        most = 2048 // channels
        steps = -(-m.rows // positions)
    else:
        window = m.span % 8 != 0 and 8 < m.span <= size - 7 and m.width % 8 == 0
        positions = next_power(m.span + 7) if window else _least_waste(m.span, size)
        channels = min(max(1, size // positions), next_power(m.channels))
        steps = m.rows * (1 if window else -(-m.span // positions))
    blocks = -(-m.channels // channels)
    parts = max(1, min(most, steps, 1024 // blocks))
    per = -(-steps // parts)
    return ReducePlan(channels, positions, window, steps, per, -(-steps // per), warps)


@dataclass(frozen=True)
class ApplyPlan:
    """Rows and columns of a tile, rows a program, programs."""

    rows: int
    columns: int
    per: int
    programs: int
    num_warps: int


@functools.lru_cache(maxsize=1024)
def apply_plan(m: Matrix) -> ApplyPlan:
    """Whole rows where they are short; a program goes on over rows while some 2000 programs are left."""
    size, warps = (TILE, 4) if m.numel >= SMALL else (256, 1)
    columns = min(size, next_power(m.width))
    rows = size // columns
    blocks, tiles = -(-m.width // columns), -(-m.rows // rows)
    per = -(-tiles // max(1, min(tiles, 2048 // blocks)))
    return ApplyPlan(rows, columns, per * rows, blocks * -(-tiles // per), warps)


def next_power(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << max(0, value - 1).bit_length()


def _least_waste(span: int, size: int) -> int:
    """The tile length, a power of two, that leaves the fewest lanes idle; the longest of equals."""
    if span <= 64:
        return next_power(span)
    lengths = [length for length in (64, 128, 256, 512, 1024) if length <= size]
    return min(lengths, key=lambda length: (-(-span // length) * length, -length))
