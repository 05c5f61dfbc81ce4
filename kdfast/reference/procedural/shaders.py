"""Shader programs in plain PyTorch: the oracle of kernels/procedural/shaders.py, bit for bit, and the path for CPUs.

A program is a list of instructions; each works on the state of every pixel: a position p = (x, y), a field v, the hash
h of the last cell p was in, and a colour. At step k the images of a batch are grouped by the operation that their
program has there, so that each operation is a handful of tensor expressions over many images.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.reference.procedural.arithmetic import (
    lattice_hash,
    length,
    limit,
    log2,
    pixel_grid,
    root,
    rotate,
    turns_of,
    unit_high,
    unit_low,
    value_noise,
    wave,
)

#: Numbers that an instruction carries, operations use the first few; rounds that one runs, whatever its number says.
SLOTS, MAX_ROUNDS = 16, 16
#: Samples of all images that are worked on at a time: enough that an operation has several images to itself.
_CHUNK = 1 << 20


class Op(enum.IntEnum):
    """What an instruction does; kernels/procedural/shaders.py has the same numbers."""

    NOTHING = 0
    VIEW = 1
    AFFINE = 2
    FOLD = 3
    MIRROR = 4
    TILE = 5
    POLAR = 6
    KALEIDOSCOPE = 7
    SWIRL = 8
    SINE_WARP = 9
    NOISE_WARP = 10
    WAVES = 11
    RINGS = 12
    GRADIENT = 13
    NOISE = 14
    WORLEY = 15
    SHAPES = 16
    JULIA = 17
    CURVE = 18
    PAINT = 19
    SHADE = 20


@dataclass
class State:
    """Every pixel's registers, each ``[images, pixels]``; ``x0``, ``y0`` are where the pixel is."""

    x0: Tensor
    y0: Tensor
    x: Tensor
    y: Tensor
    v: Tensor
    h: Tensor
    r: Tensor
    g: Tensor
    b: Tensor

    def put(self, x: Tensor, y: Tensor) -> None:
        """Move every pixel's position, within bounds."""
        self.x, self.y = limit(x), limit(y)

    def combine(self, new: Tensor, keep: Tensor, add: Tensor, times: Tensor) -> None:
        """Join a new field to the one there is."""
        self.v = limit(keep * self.v + add * new + times * (self.v * new))


#: An instruction's numbers at the image's time, each ``[images, 1]``.
Numbers = list[Tensor]


def _turned(turns: Tensor) -> tuple[Tensor, Tensor]:
    return wave(turns), wave(turns + 0.25)


def _view(s: State, n: Numbers) -> None:
    sine, cosine = _turned(n[0])
    x, y = rotate(s.x0 * n[1], s.y0 * n[2], sine, cosine)
    s.put(x + n[3], y + n[4])
    s.v, s.h = torch.zeros_like(s.v), torch.zeros_like(s.h)


def _affine(s: State, n: Numbers) -> None:
    sine, cosine = _turned(n[0])
    x, y = rotate(s.x * n[1], s.y * n[2], sine, cosine)
    s.put(x + n[3], y + n[4])


def _fold(s: State, n: Numbers) -> None:
    x, y = s.x, s.y
    before, total, weight = length(x, y), torch.zeros_like(x), torch.ones_like(n[0])
    for k in range(_count(n[0])):
        on = n[0] > k
        scale = 1.0 / (x * x + y * y).clamp(min=1e-4)
        nx, ny = x.abs() * scale - n[1], y.abs() * scale - n[2]
        far = length(nx, ny)
        gained = total + weight * (far - before).abs().clamp(max=4.0)
        x, y = torch.where(on, nx, x), torch.where(on, ny, y)
        before, total = torch.where(on, far, before), torch.where(on, gained, total)
        weight = weight * n[3]
    s.put(x, y)
    s.combine(total * n[4], n[5], n[6], n[7])


def _mirror(s: State, n: Numbers) -> None:
    sine, cosine = _turned(n[1])
    x, y = s.x, s.y
    for k in range(_count(n[0])):
        on = n[0] > k
        nx, ny = rotate(x.abs() - n[2], y.abs() - n[3], sine, cosine)
        x, y = torch.where(on, limit(nx * n[4]), x), torch.where(on, limit(ny * n[4]), y)
    s.put(x, y)


def _tile(s: State, n: Numbers) -> None:
    x, y = s.x * n[0], s.y * n[1]
    row = torch.floor(y + 0.5)
    x = x + row * n[2]
    column = torch.floor(x + 0.5)
    x, y = x - column, y - row
    # Every other cell mirrored: 1 − 2·(column mod 2), blended in by n[3].
    odd = column - 2.0 * torch.floor(column * 0.5)
    x = x * (1.0 - 2.0 * (odd * n[3]))
    s.put(x * n[4], y * n[4])
    s.h = unit_low(lattice_hash(column.to(torch.int32), row.to(torch.int32), n[5].to(torch.int32)))


def _polar(s: State, n: Numbers) -> None:
    radius = length(s.x, s.y).clamp(min=1e-3)
    turns, octave = turns_of(s.x, s.y), log2(radius)
    x = turns * n[0] + octave * n[1]
    y = octave * n[2] + radius * n[3] + n[4] / radius
    s.put(x + n[5], y + n[6])


def _kaleidoscope(s: State, n: Numbers) -> None:
    radius, turns = length(s.x, s.y), turns_of(s.x, s.y) * n[0] + n[1]
    sector = (turns - torch.floor(turns + 0.5)).abs() / n[0] + n[2]
    s.put(radius * wave(sector + 0.25), radius * wave(sector))


def _swirl(s: State, n: Numbers) -> None:
    x, y = s.x - n[2], s.y - n[3]
    sine, cosine = _turned(n[0] / (1.0 + (x * x + y * y) * n[1]))
    x, y = rotate(x, y, sine, cosine)
    s.put(x + n[2], y + n[3])


def _sine_warp(s: State, n: Numbers) -> None:
    x, y, amplitude, frequency, phase = s.x, s.y, n[1], n[2], n[5]
    for k in range(_count(n[0])):
        on = n[0] > k
        nx = x + amplitude * wave(frequency * y + phase)
        ny = y + amplitude * wave(frequency * nx + n[6])
        x, y = torch.where(on, nx, x), torch.where(on, ny, y)
        amplitude, frequency, phase = amplitude * n[3], frequency * n[4], phase + 0.381966
    s.put(x, y)


def _fbm(s: State, octaves: Tensor, frequency: Tensor, gain: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Two sums of value noise over octaves, each in about [−1, 1]."""
    first, second = torch.zeros_like(s.x), torch.zeros_like(s.x)
    x, y, weight = limit(s.x * frequency), limit(s.y * frequency), torch.ones_like(gain)
    key = seed.to(torch.int32)
    for k in range(_count(octaves)):
        on = octaves > k
        a, b = value_noise(x, y, key)
        first = torch.where(on, first + weight * (2.0 * a - 1.0), first)
        second = torch.where(on, second + weight * (2.0 * b - 1.0), second)
        # Octaves are turned against each other, so that their lattices do not show.
        x, y = limit(1.6 * x + 1.2 * y), limit(1.6 * y - 1.2 * x)
        weight, key = weight * gain, key + 1013
    return first, second


def _noise_warp(s: State, n: Numbers) -> None:
    a, b = _fbm(s, n[0], n[2], n[3], n[4])
    s.put(s.x + n[1] * a + n[5], s.y + n[1] * b + n[6])


def _waves(s: State, n: Numbers) -> None:
    s.combine(wave(s.x * n[0] + s.y * n[1] + n[2]) * n[3], n[4], n[5], n[6])


def _rings(s: State, n: Numbers) -> None:
    radius = length(s.x - n[1], s.y - n[2])
    s.combine(wave(radius * n[0] + n[3]) * n[4], n[5], n[6], n[7])


def _gradient(s: State, n: Numbers) -> None:
    new = s.x * n[0] + s.y * n[1] + length(s.x, s.y) * n[2] + n[3]
    s.combine(new, n[4], n[5], n[6])


def _noise(s: State, n: Numbers) -> None:
    a, _ = _fbm(s, n[0], n[1], n[2], n[3])
    ridged = 1.0 - 2.0 * a.abs()
    s.combine((a + (ridged - a) * n[4]) * n[5], n[6], n[7], n[8])


def _worley(s: State, n: Numbers) -> None:
    x, y = limit(s.x * n[0]), limit(s.y * n[0])
    fx, fy = torch.floor(x), torch.floor(y)
    ix, iy, key = fx.to(torch.int32), fy.to(torch.int32), n[1].to(torch.int32)
    u, v = x - fx, y - fy
    first, second, cell = torch.full_like(x, 9.0), torch.full_like(x, 9.0), torch.zeros_like(x)
    for k in range(9):
        dx, dy = k % 3 - 1, k // 3 - 1
        h = lattice_hash(ix + dx, iy + dy, key)
        low, high = unit_low(h), unit_high(h)
        away_x = float(dx) + 0.5 + (low - 0.5) * n[2] - u
        away_y = float(dy) + 0.5 + (high - 0.5) * n[2] - v
        square = away_x * away_x + away_y * away_y
        nearer = square < first
        second = torch.where(nearer, first, torch.minimum(second, square))
        cell = torch.where(nearer, low, cell)
        first = torch.where(nearer, square, first)
    near, next_ = root(first), root(second)
    s.h = cell
    s.combine(near * n[3] + (next_ - near) * n[4] + n[5], n[6], n[7], n[8])


def _shapes(s: State, n: Numbers) -> None:
    """The nearest of several shapes, each turned, shifted and shrunk against the one before it."""
    sine, cosine = _turned(n[3])
    x, y, scale = s.x, s.y, torch.ones_like(n[2])
    best = torch.full_like(x, 64.0)
    for k in range(_count(n[1])):
        on = n[1] > k
        ax, ay = x.abs(), y.abs()
        disc = length(x, y)
        square = torch.maximum(ax, ay)
        diamond = (ax + ay) * 0.70710678
        triangle = torch.maximum(ax * 0.8660254 + y * 0.5, -y)
        cross = torch.minimum(torch.maximum(ax, 3.0 * ay), torch.maximum(3.0 * ax, ay))
        kind = n[0]
        norm = torch.where(
            kind < 1, disc, torch.where(kind < 2, square, torch.where(kind < 3, diamond, triangle))
        )
        norm = torch.where(kind < 4, norm, cross)
        distance = (norm - n[2]) * scale
        best = torch.where(on, torch.minimum(best, distance), best)
        x, y = rotate(x - n[4], y - n[5], sine, cosine)
        x, y = limit(x * n[6]), limit(y * n[6])
        scale = scale / n[6]
    # A hollow shape is the distance to its outline less half its width.
    hollow = best.abs() - n[7]
    s.combine(torch.where(n[7] > 0, hollow, best) * n[8], n[9], n[10], n[11])


def _julia(s: State, n: Numbers) -> None:
    x, y = s.x, s.y
    square, near = x * x + y * y, torch.full_like(x, 16.0)
    count = torch.zeros_like(x)
    for k in range(_count(n[0])):
        on = (n[0] > k) & (square < 16.0)
        nx, ny = x * x - y * y + n[1], 2.0 * (x * y) + n[2]
        x, y = torch.where(on, nx, x), torch.where(on, ny, y)
        count = torch.where(on, count + 1.0, count)
        square = x * x + y * y
        near = torch.minimum(near, square)
    # The fraction of a step makes the count smooth: log₂ log₂ |z|², which grows by one a step.
    beyond = log2(log2(square.clamp(min=16.0, max=1e6)) * 0.25)
    smooth = count - torch.where(square < 16.0, torch.zeros_like(count), beyond)
    s.put(x, y)
    s.combine(smooth * n[3] + root(near) * n[4], n[5], n[6], n[7])


def _curve(s: State, n: Numbers) -> None:
    u, kind = s.v * n[1] + n[2], n[0]
    steps = torch.floor(u)
    triangle = (u - 2.0 * torch.floor(u * 0.5 + 0.5)).abs()
    soft = u / (1.0 + u.abs())
    saw = u - steps
    folded = torch.where(kind < 1, u.abs(), torch.where(kind < 2, triangle, torch.where(kind < 3, soft, saw)))
    folded = torch.where(kind < 4, folded, (steps + 0.5) * n[4])
    s.v = limit(folded * n[3] + s.h * n[5])


def _paint(s: State, n: Numbers) -> None:
    u = s.v * n[0] + s.h * n[1] + n[2]
    cover = (n[12] + s.v * n[13] + s.v.abs() * n[14]).clamp(0.0, 1.0)
    under = 1.0 - cover * n[15]
    s.r = (s.r * under + cover * (n[3] + n[6] * wave(u + n[9]))).clamp(-1.0, 4.0)
    s.g = (s.g * under + cover * (n[4] + n[7] * wave(u + n[10]))).clamp(-1.0, 4.0)
    s.b = (s.b * under + cover * (n[5] + n[8] * wave(u + n[11]))).clamp(-1.0, 4.0)


def _shade(s: State, n: Numbers) -> None:
    light = n[0] + s.v * n[1] + (s.x0 * s.x0 + s.y0 * s.y0) * n[2]
    light = light.clamp(0.0, 2.0)
    s.r, s.g, s.b = s.r * light, s.g * light, s.b * light


_RUN: dict[Op, Callable[[State, Numbers], None]] = {
    Op.VIEW: _view,
    Op.AFFINE: _affine,
    Op.FOLD: _fold,
    Op.MIRROR: _mirror,
    Op.TILE: _tile,
    Op.POLAR: _polar,
    Op.KALEIDOSCOPE: _kaleidoscope,
    Op.SWIRL: _swirl,
    Op.SINE_WARP: _sine_warp,
    Op.NOISE_WARP: _noise_warp,
    Op.WAVES: _waves,
    Op.RINGS: _rings,
    Op.GRADIENT: _gradient,
    Op.NOISE: _noise,
    Op.WORLEY: _worley,
    Op.SHAPES: _shapes,
    Op.JULIA: _julia,
    Op.CURVE: _curve,
    Op.PAINT: _paint,
    Op.SHADE: _shade,
}


def _count(repeats: Tensor) -> int:
    """Rounds that the image with the most of them needs; the others stand still in the last ones."""
    return int(repeats.nan_to_num(0.0).max().clamp(max=MAX_ROUNDS).ceil())


class Programs(NamedTuple):
    """A table of programs, and which of them a batch shows when."""

    codes: Tensor  # int32 [P, L]: operations, 0 behind a program's end
    values: Tensor  # float32 [P, L, 16]: their numbers at time 0
    rates: Tensor  # float32 [P, L, 16]: what a unit of time adds to each
    program: Tensor  # int64 [B]: rows of the table
    time: Tensor  # float32 [B]


def render(programs: Programs, height: int, width: int, antialias: int, dtype: torch.dtype) -> Tensor:
    """Images ``[B, 3, H, W]`` of programs, ``antialias`` samples a pixel and side; uint8, or float32 for [0, 1]."""
    codes, values, rates, program, time = programs
    xs, ys = pixel_grid(height, width, antialias, codes.device)
    images = [
        _render(codes[p], values[p] + rates[p] * t.view(-1, 1, 1), xs, ys)
        for p, t in zip(*_chunks(program.long(), time, xs.numel()))
    ]
    colour = torch.cat(images) if images else values.new_empty(0, 3, xs.shape[1])
    colour = colour.view(-1, 3, height, width)
    return colour if dtype == torch.float32 else torch.floor(colour * 255.0 + 0.5).to(torch.uint8)


def _chunks(program: Tensor, time: Tensor, samples: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    size = max(1, _CHUNK // samples)
    return torch.split(program, size), torch.split(time, size)


def _render(codes: Tensor, numbers: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """``[B, 3, H·W]`` in [0, 1], of ``[B, L]`` codes and ``[B, L, SLOTS]`` numbers."""
    count = codes.shape[0]
    samples, pixels = xs.shape
    x0, y0 = (grid.reshape(1, -1).expand(count, -1) for grid in (xs, ys))
    registers = [x0, y0, x0.clone(), y0.clone(), *(torch.zeros_like(x0).contiguous() for _ in range(5))]
    for k in range(codes.shape[1]):
        here = codes[:, k].tolist()
        for code in sorted(set(here) - {int(Op.NOTHING)}):
            rows = torch.tensor([i for i, c in enumerate(here) if c == code], device=codes.device)
            whole = len(rows) == count
            state = State(*(r if whole else r.index_select(0, rows) for r in registers))
            own = numbers[:, k] if whole else numbers[:, k].index_select(0, rows)
            _RUN[Op(code)](state, [own[:, j : j + 1] for j in range(SLOTS)])
            for j, name in enumerate(("x", "y", "v", "h", "r", "g", "b"), start=2):
                if whole:
                    registers[j] = getattr(state, name)
                else:
                    registers[j].index_copy_(0, rows, getattr(state, name).expand(len(rows), -1))
    share = torch.tensor(1.0 / samples, dtype=torch.float32, device=codes.device)
    channels = []
    for register in registers[6:]:
        clamped = register.clamp(0.0, 1.0).view(count, samples, pixels)
        total = clamped[:, 0]
        for k in range(1, samples):
            total = total + clamped[:, k]
        channels.append(total * share)
    return torch.stack(channels, 1)
