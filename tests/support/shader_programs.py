"""One gentle program for each operation, and what they draw: written in float64 and numpy, by the definitions alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdfast.data.surrogate import Instruction, Program
from kdfast.data.surrogate.programs import OPERATIONS

_FIRST, _JOINED = (0.0, 1.0, 0.0), (0.6, 0.7, -0.4)
_SLOPE = Instruction("gradient", (0.31, -0.23, 0.17, 0.05, *_FIRST))
_PAINT = Instruction(
    "paint",
    (0.7, 0.4, 0.1, 0.5, 0.45, 0.4, 0.4, 0.35, 0.3, 0.0, 0.21, 0.43, 0.9, 0.6, -0.5, 0.8),
    (0.0, 0.0, 1.0, *(0.0,) * 13),
)
_GROUND = Instruction("paint", (0.3, 0.0, 0.2, *(0.4,) * 3, *(0.2,) * 3, 0.1, 0.3, 0.6, 1.0, 0.0, 0.0, 1.0))
_UNDER_TEST: dict[str, tuple[float, ...]] = {
    "view": (0.13, 1.3, 0.8, 0.21, -0.17),
    "affine": (-0.21, 0.9, 1.2, 0.3, 0.11),
    "fold": (2, 0.83, 0.61, 0.7, 0.4, *_JOINED),
    "mirror": (3, 0.07, 0.31, 0.23, 1.2),
    "tile": (1.7, 1.3, 0.5, 1.0, 1.9, 77),
    "polar": (3, 0.4, 0.7, 0.3, 0.05, 0.2, 0.1),
    "kaleidoscope": (5, 0.13, 0.29),
    "swirl": (0.6, 1.7, 0.2, -0.1),
    "sine_warp": (3, 0.21, 0.6, 0.7, 1.6, 0.11, 0.37),
    "noise_warp": (3, 0.4, 1.3, 0.5, 19, 0.05, -0.03),
    "waves": (0.9, -0.6, 0.15, 0.8, *_JOINED),
    "rings": (1.3, 0.21, -0.33, 0.2, 0.9, *_JOINED),
    "gradient": (0.5, 0.3, -0.4, 0.1, *_JOINED),
    "noise": (3, 1.7, 0.55, 5, 0.4, 1.1, *_JOINED),
    "worley": (1.9, 11, 0.9, 0.8, 0.5, -0.2, *_JOINED),
    "shapes": (3, 4, 0.37, 0.09, 0.31, -0.22, 1.3, 0.07, 1.7, *_JOINED),
    "julia": (6, -0.41, 0.57, 0.2, 0.6, *_JOINED),
    "curve": (1, 1.7, 0.2, 0.9, 0.4, 0.5),
    "shade": (1.05, 0.3, -0.2),
}
#: In each program the operation works on a field that is there already, and is painted over a ground.
PROGRAMS = [Program((_SLOPE, _PAINT))]
for _op, _values in _UNDER_TEST.items():
    _step = Instruction(_op, _values)
    _body = (_SLOPE, _PAINT, _step) if _op == "shade" else (_SLOPE, _step, _SLOPE, _PAINT)
    if OPERATIONS[_op][-1] == "times":
        _body = (_SLOPE, _step, _PAINT)
    if _op == "curve":  # with cells to tell apart
        _body = (_SLOPE, Instruction("worley", _UNDER_TEST["worley"]), _step, _PAINT)
    PROGRAMS.append(Program((_SLOPE, _GROUND, *_body)))
PROGRAMS += [
    Program((_SLOPE, Instruction("curve", (kind, 2.3, 0.2, 0.9, 0.4, 0.0)), _PAINT)) for kind in (0, 2, 3, 4)
]
PROGRAMS += [
    Program((Instruction("shapes", (kind, 2, 0.4, 0.1, 0.3, 0.2, 1.2, 0.0, 1.5, *_FIRST)), _PAINT))
    for kind in (0, 1, 2, 4)
]


def _wave(t: Any) -> Any:
    return np.sin(2 * np.pi * t)


def _turn(z: Any, turns: float) -> Any:
    return z * np.exp(2j * np.pi * turns)


def _hash(ix: Any, iy: Any, seed: int) -> Any:
    word = 0xFFFFFFFF
    h = (ix.astype(np.int64) * 0x27D4EB2D + iy.astype(np.int64) * 0x165667B1 + seed) & word
    h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & word
    h = ((h ^ (h >> 12) & 0xFFFFF) * 0x297A2D39) & word
    return h ^ (h >> 15)


def _low(h: Any) -> Any:
    return (h & 0xFFFF) / 65536


def _high(h: Any) -> Any:
    return (h >> 16) / 65536


def _fbm(z: Any, octaves: float, frequency: float, gain: float, seed: float) -> Any:
    """Both sums as one complex number."""
    z, total = z * frequency, 0
    for k in range(int(octaves)):
        x, y = np.floor(z.real), np.floor(z.imag)
        u, v = (3 * w**2 - 2 * w**3 for w in (z.real - x, z.imag - y))
        corner = {(i, j): _hash(x + i, y + j, int(seed) + 1013 * k) for i in (0, 1) for j in (0, 1)}
        for part, unit in ((_low, 1), (_high, 1j)):
            a = part(corner[0, 0]) * (1 - u) + part(corner[1, 0]) * u
            b = part(corner[0, 1]) * (1 - u) + part(corner[1, 1]) * u
            total = total + unit * gain**k * (2 * (a * (1 - v) + b * v) - 1)
        z = z * (1.6 - 1.2j)
    return total


def _worley(z: Any, frequency: float, seed: float, jitter: float) -> Any:
    z = z * frequency
    x, y = np.floor(z.real), np.floor(z.imag)
    distances, cells = [], []
    for j in (-1, 0, 1):
        for i in (-1, 0, 1):
            h = _hash(x + i, y + j, int(seed))
            centre = x + i + 0.5 + (_low(h) - 0.5) * jitter + 1j * (y + j + 0.5 + (_high(h) - 0.5) * jitter)
            distances.append(abs(z - centre))
            cells.append(_low(h))
    order = np.argsort(distances, axis=0)
    near = np.take_along_axis(np.array(distances), order[:2], 0)
    return near[0], near[1], np.take_along_axis(np.array(cells), order[:1], 0)[0]


def _norm(z: Any, kind: float) -> Any:
    ax, ay, y = abs(z.real), abs(z.imag), z.imag
    return [
        lambda: abs(z),
        lambda: np.maximum(ax, ay),
        lambda: (ax + ay) / np.sqrt(2),
        lambda: np.maximum(ax * np.sqrt(3) / 2 + y / 2, -y),
        lambda: np.minimum(np.maximum(ax, 3 * ay), np.maximum(3 * ax, ay)),
    ][int(kind)]()


def _julia(z: Any, rounds: float, c: complex) -> tuple[Any, Any, Any]:
    count, near = np.zeros(z.shape), np.full(z.shape, 4.0)
    for _ in range(int(rounds)):
        on = abs(z) < 4
        z = np.where(on, z * z + c, z)
        count = count + on
        near = np.minimum(near, abs(z))
    beyond = np.log2(np.log2(np.clip(abs(z) ** 2, 16, 1e6)) / 4)
    return z, count - np.where(abs(z) < 4, 0, beyond), near


def draw(program: Program, time: float, height: int, width: int, antialias: int) -> Any:
    """float64 ``[3, height, width]``."""
    shorter = min(height, width)
    fine = [(np.arange(size * antialias) + 0.5) / antialias for size in (height, width)]
    place = ((fine[1] - width / 2)[None, :] - 1j * (fine[0] - height / 2)[:, None]) * (2 / shorter)
    z, v, h = place, np.zeros(place.shape), np.zeros(place.shape)
    colour = np.zeros((3, *place.shape))
    for step in program.instructions:
        n = [a + b * time for a, b in zip(step.values, step.rates)]
        new, op = None, step.op
        if op in ("view", "affine"):
            start = place if op == "view" else z
            z = _turn(start.real * n[1] + 1j * start.imag * n[2], n[0]) + n[3] + 1j * n[4]
            if op == "view":
                v, h = 0 * v, 0 * h
        elif op == "fold":
            total, before = 0, abs(z)
            for k in range(int(n[0])):
                z = (abs(z.real) + 1j * abs(z.imag)) / np.maximum(abs(z) ** 2, 1e-4) - n[1] - 1j * n[2]
                total = total + n[3] ** k * np.minimum(abs(abs(z) - before), 4)
                before = abs(z)
            new = total * n[4]
        elif op == "mirror":
            for _ in range(int(n[0])):
                z = _turn(abs(z.real) - n[2] + 1j * (abs(z.imag) - n[3]), n[1]) * n[4]
        elif op == "tile":
            y = z.imag * n[1]
            row = np.floor(y + 0.5)
            x = z.real * n[0] + row * n[2]
            column = np.floor(x + 0.5)
            x = (x - column) * np.where(column % 2 == 1, 1 - 2 * n[3], 1)
            z = (x + 1j * (y - row)) * n[4]
            h = _low(_hash(column, row, int(n[5])))
        elif op == "polar":
            r, a, o = abs(z), np.angle(z) / (2 * np.pi), np.log2(abs(z))
            z = a * n[0] + o * n[1] + n[5] + 1j * (o * n[2] + r * n[3] + n[4] / r + n[6])
        elif op == "kaleidoscope":
            a = np.angle(z) / (2 * np.pi) * n[0] + n[1]
            z = _turn(abs(z), abs(a - np.floor(a + 0.5)) / n[0] + n[2])
        elif op == "swirl":
            centre = n[2] + 1j * n[3]
            z = _turn(z - centre, n[0] / (1 + abs(z - centre) ** 2 * n[1])) + centre
        elif op == "sine_warp":
            x, y = z.real, z.imag
            for k in range(int(n[0])):
                x = x + n[1] * n[3] ** k * _wave(n[2] * n[4] ** k * y + n[5] + 0.381966 * k)
                y = y + n[1] * n[3] ** k * _wave(n[2] * n[4] ** k * x + n[6])
            z = x + 1j * y
        elif op == "noise_warp":
            z = z + n[1] * _fbm(z, n[0], n[2], n[3], n[4]) + n[5] + 1j * n[6]
        elif op == "waves":
            new = _wave(z.real * n[0] + z.imag * n[1] + n[2]) * n[3]
        elif op == "rings":
            new = _wave(abs(z - n[1] - 1j * n[2]) * n[0] + n[3]) * n[4]
        elif op == "gradient":
            new = z.real * n[0] + z.imag * n[1] + abs(z) * n[2] + n[3]
        elif op == "noise":
            a = _fbm(z, n[0], n[1], n[2], n[3]).real
            new = (a * (1 - n[4]) + (1 - 2 * abs(a)) * n[4]) * n[5]
        elif op == "worley":
            near, after, h = _worley(z, n[0], n[1], n[2])
            new = near * n[3] + (after - near) * n[4] + n[5]
        elif op == "shapes":
            best, at, scale = np.full(z.shape, 64.0), z, 1.0
            for _ in range(int(n[1])):
                best = np.minimum(best, (_norm(at, n[0]) - n[2]) * scale)
                at, scale = _turn(at - n[4] - 1j * n[5], n[3]) * n[6], scale / n[6]
            new = (abs(best) - n[7] if n[7] > 0 else best) * n[8]
        elif op == "julia":
            z, smooth, near = _julia(z, n[0], n[1] + 1j * n[2])
            new = smooth * n[3] + near * n[4]
        elif op == "curve":
            u = v * n[1] + n[2]
            bent = [abs(u), abs((u + 1) % 2 - 1), u / (1 + abs(u)), u % 1, (np.floor(u) + 0.5) * n[4]]
            v = bent[int(n[0])] * n[3] + h * n[5]
        elif op == "paint":
            u = v * n[0] + h * n[1] + n[2]
            cover = np.clip(n[12] + v * n[13] + abs(v) * n[14], 0, 1)
            tones = np.stack([n[3 + k] + n[6 + k] * _wave(u + n[9 + k]) for k in range(3)])
            colour = colour * (1 - cover * n[15]) + cover * tones
        elif op == "shade":
            colour = colour * np.clip(n[0] + v * n[1] + abs(place) ** 2 * n[2], 0, 2)
        if new is not None:
            keep, add, times = n[-3:]
            v = keep * v + add * new + times * v * new
    clamped = np.clip(colour, 0, 1).reshape(3, height, antialias, width, antialias)
    return clamped.mean((2, 4))
