"""What each instruction of a shader program does to a block of pixels, and the loop over a program.

One function an operation, in the order of kdfast/reference/procedural/shaders.py, which has the same names. An
instruction's numbers are loaded where they are used, as scalars: every pixel of a block runs the same program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    between,
    lattice_hash,
    length,
    limit,
    log2,
    rotate,
    turns_of,
    unit_high,
    unit_low,
    value_noise,
    wave,
)

SLOTS = tl.constexpr(16)
MAX_ROUNDS = tl.constexpr(16)


@triton.jit
def _number(at, rate, t, SLOT: tl.constexpr):
    """Number SLOT of the instruction at the image's time."""
    return tl.load(at + SLOT) + tl.load(rate + SLOT) * t


@triton.jit
def _rounds(number):
    """The number rounded up, as an integer that a loop comes to the end of: 0 for NaN, MAX_ROUNDS at most."""
    return -(tl.floor(-tl.where(number > 0, tl.minimum(number, MAX_ROUNDS), 0.0)).to(tl.int32))


@triton.jit
def _turned(turns):
    return wave(turns), wave(turns + 0.25)


@triton.jit
def _combined(v, new, at, rate, t, SLOT: tl.constexpr):
    """The field with a new one joined on: keep, add and times are the numbers from SLOT on."""
    keep, add = _number(at, rate, t, SLOT), _number(at, rate, t, SLOT + 1)
    return limit(keep * v + add * new + _number(at, rate, t, SLOT + 2) * (v * new))


@triton.jit
def _affine(x, y, at, rate, t):
    sine, cosine = _turned(_number(at, rate, t, 0))
    x, y = rotate(x * _number(at, rate, t, 1), y * _number(at, rate, t, 2), sine, cosine)
    return limit(x + _number(at, rate, t, 3)), limit(y + _number(at, rate, t, 4))


@triton.jit
def _fold(x, y, v, at, rate, t):
    shift_x, shift_y, decay = _number(at, rate, t, 1), _number(at, rate, t, 2), _number(at, rate, t, 3)
    before, total, weight = length(x, y), tl.zeros_like(x), 1.0
    for _ in range(_rounds(_number(at, rate, t, 0))):
        scale = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.maximum(x * x + y * y, 1e-4))
        x, y = tl.abs(x) * scale - shift_x, tl.abs(y) * scale - shift_y
        far = length(x, y)
        total = total + weight * tl.minimum(tl.abs(far - before), 4.0)
        before = far
        weight = weight * decay
    v = _combined(v, total * _number(at, rate, t, 4), at, rate, t, 5)
    return limit(x), limit(y), v


@triton.jit
def _mirror(x, y, at, rate, t):
    sine, cosine = _turned(_number(at, rate, t, 1))
    shift_x, shift_y, scale = _number(at, rate, t, 2), _number(at, rate, t, 3), _number(at, rate, t, 4)
    for _ in range(_rounds(_number(at, rate, t, 0))):
        x, y = rotate(tl.abs(x) - shift_x, tl.abs(y) - shift_y, sine, cosine)
        x, y = limit(x * scale), limit(y * scale)
    return limit(x), limit(y)


@triton.jit
def _tile(x, y, at, rate, t):
    x, y = x * _number(at, rate, t, 0), y * _number(at, rate, t, 1)
    row = tl.floor(y + 0.5)
    x = x + row * _number(at, rate, t, 2)
    column = tl.floor(x + 0.5)
    x, y = x - column, y - row
    odd = column - 2.0 * tl.floor(column * 0.5)
    x = x * (1.0 - 2.0 * (odd * _number(at, rate, t, 3)))
    scale = _number(at, rate, t, 4)
    key = _number(at, rate, t, 5).to(tl.int32)
    h = unit_low(lattice_hash(column.to(tl.int32), row.to(tl.int32), key))
    return limit(x * scale), limit(y * scale), h


@triton.jit
def _polar(x, y, at, rate, t):
    radius = tl.maximum(length(x, y), 1e-3)
    turns, octave = turns_of(x, y), log2(radius)
    x = turns * _number(at, rate, t, 0) + octave * _number(at, rate, t, 1)
    tunnel = tl.div_rn(_number(at, rate, t, 4) + tl.zeros_like(radius), radius)
    y = octave * _number(at, rate, t, 2) + radius * _number(at, rate, t, 3) + tunnel
    return limit(x + _number(at, rate, t, 5)), limit(y + _number(at, rate, t, 6))


@triton.jit
def _kaleidoscope(x, y, at, rate, t):
    sectors = _number(at, rate, t, 0)
    radius, turns = length(x, y), turns_of(x, y) * sectors + _number(at, rate, t, 1)
    within = tl.abs(turns - tl.floor(turns + 0.5))
    sector = tl.div_rn(within, sectors + tl.zeros_like(within)) + _number(at, rate, t, 2)
    return limit(radius * wave(sector + 0.25)), limit(radius * wave(sector))


@triton.jit
def _swirl(x, y, at, rate, t):
    centre_x, centre_y = _number(at, rate, t, 2), _number(at, rate, t, 3)
    x, y = x - centre_x, y - centre_y
    spread = 1.0 + (x * x + y * y) * _number(at, rate, t, 1)
    sine, cosine = _turned(tl.div_rn(_number(at, rate, t, 0) + tl.zeros_like(spread), spread))
    x, y = rotate(x, y, sine, cosine)
    return limit(x + centre_x), limit(y + centre_y)


@triton.jit
def _sine_warp(x, y, at, rate, t):
    amplitude, frequency = _number(at, rate, t, 1), _number(at, rate, t, 2)
    decay, growth = _number(at, rate, t, 3), _number(at, rate, t, 4)
    phase_x, phase_y = _number(at, rate, t, 5), _number(at, rate, t, 6)
    for _ in range(_rounds(_number(at, rate, t, 0))):
        x = x + amplitude * wave(frequency * y + phase_x)
        y = y + amplitude * wave(frequency * x + phase_y)
        amplitude, frequency, phase_x = amplitude * decay, frequency * growth, phase_x + 0.381966
    return limit(x), limit(y)


@triton.jit
def _fbm(x, y, octaves, frequency, gain, seed):
    """Two sums of value noise over octaves, each in about [−1, 1]."""
    first, second = tl.zeros_like(x), tl.zeros_like(x)
    x, y, weight, key = limit(x * frequency), limit(y * frequency), 1.0, seed.to(tl.int32)
    for _ in range(_rounds(octaves)):
        a, b = value_noise(x, y, key)
        first = first + weight * (2.0 * a - 1.0)
        second = second + weight * (2.0 * b - 1.0)
        x, y = limit(1.6 * x + 1.2 * y), limit(1.6 * y - 1.2 * x)
        weight, key = weight * gain, key + 1013
    return first, second


@triton.jit
def _noise_warp(x, y, at, rate, t):
    amplitude, frequency = _number(at, rate, t, 1), _number(at, rate, t, 2)
    decay, key = _number(at, rate, t, 3), _number(at, rate, t, 4)
    a, b = _fbm(x, y, _number(at, rate, t, 0), frequency, decay, key)
    x = limit(x + amplitude * a + _number(at, rate, t, 5))
    return x, limit(y + amplitude * b + _number(at, rate, t, 6))


@triton.jit
def _waves(x, y, v, at, rate, t):
    new = wave(x * _number(at, rate, t, 0) + y * _number(at, rate, t, 1) + _number(at, rate, t, 2))
    return _combined(v, new * _number(at, rate, t, 3), at, rate, t, 4)


@triton.jit
def _rings(x, y, v, at, rate, t):
    radius = length(x - _number(at, rate, t, 1), y - _number(at, rate, t, 2))
    new = wave(radius * _number(at, rate, t, 0) + _number(at, rate, t, 3))
    return _combined(v, new * _number(at, rate, t, 4), at, rate, t, 5)


@triton.jit
def _gradient(x, y, v, at, rate, t):
    new = x * _number(at, rate, t, 0) + y * _number(at, rate, t, 1) + length(x, y) * _number(at, rate, t, 2)
    return _combined(v, new + _number(at, rate, t, 3), at, rate, t, 4)


@triton.jit
def _noise(x, y, v, at, rate, t):
    frequency, decay, key = _number(at, rate, t, 1), _number(at, rate, t, 2), _number(at, rate, t, 3)
    a, _ = _fbm(x, y, _number(at, rate, t, 0), frequency, decay, key)
    ridged = 1.0 - 2.0 * tl.abs(a)
    new = (a + (ridged - a) * _number(at, rate, t, 4)) * _number(at, rate, t, 5)
    return _combined(v, new, at, rate, t, 6)


@triton.jit
def _worley(x, y, v, at, rate, t):
    frequency, key = _number(at, rate, t, 0), _number(at, rate, t, 1).to(tl.int32)
    jitter = _number(at, rate, t, 2)
    x, y = limit(x * frequency), limit(y * frequency)
    fx, fy = tl.floor(x), tl.floor(y)
    ix, iy = fx.to(tl.int32), fy.to(tl.int32)
    u, w = x - fx, y - fy
    first, second = tl.full(x.shape, 9.0, tl.float32), tl.full(x.shape, 9.0, tl.float32)
    cell = tl.zeros_like(x)
    for k in range(9):
        dx, dy = k % 3 - 1, k // 3 - 1
        h = lattice_hash(ix + dx, iy + dy, key)
        low = unit_low(h)
        away_x = dx * 1.0 + 0.5 + (low - 0.5) * jitter - u
        away_y = dy * 1.0 + 0.5 + (unit_high(h) - 0.5) * jitter - w
        square = away_x * away_x + away_y * away_y
        nearer = square < first
        second = tl.where(nearer, first, tl.minimum(second, square))
        cell = tl.where(nearer, low, cell)
        first = tl.where(nearer, square, first)
    near, after = tl.sqrt_rn(first), tl.sqrt_rn(second)
    new = near * _number(at, rate, t, 3) + (after - near) * _number(at, rate, t, 4)
    return _combined(v, new + _number(at, rate, t, 5), at, rate, t, 6), cell


@triton.jit
def _outline(x, y, kind):
    """The norm whose unit ball is the shape: disc, square, diamond, triangle or cross."""
    ax, ay = tl.abs(x), tl.abs(y)
    norm = length(x, y)
    if kind >= 1:
        norm = tl.maximum(ax, ay)
    if kind >= 2:
        norm = (ax + ay) * 0.70710678
    if kind >= 3:
        norm = tl.maximum(ax * 0.8660254 + y * 0.5, -y)
    if kind >= 4:
        norm = tl.minimum(tl.maximum(ax, 3.0 * ay), tl.maximum(3.0 * ax, ay))
    return norm


@triton.jit
def _shapes(x, y, v, at, rate, t):
    sine, cosine = _turned(_number(at, rate, t, 3))
    kind, size, shrink = _number(at, rate, t, 0), _number(at, rate, t, 2), _number(at, rate, t, 6)
    shift_x, shift_y, hollow = _number(at, rate, t, 4), _number(at, rate, t, 5), _number(at, rate, t, 7)
    best, scale = tl.full(x.shape, 64.0, tl.float32), 1.0
    for _ in range(_rounds(_number(at, rate, t, 1))):
        best = tl.minimum(best, (_outline(x, y, kind) - size) * scale)
        x, y = rotate(x - shift_x, y - shift_y, sine, cosine)
        x, y = limit(x * shrink), limit(y * shrink)
        scale = tl.div_rn(scale, shrink)
    best = tl.where(hollow > 0, tl.abs(best) - hollow, best)
    return _combined(v, best * _number(at, rate, t, 8), at, rate, t, 9)


@triton.jit
def _julia(x, y, v, at, rate, t):
    c_x, c_y = _number(at, rate, t, 1), _number(at, rate, t, 2)
    square, near, count = x * x + y * y, tl.full(x.shape, 16.0, tl.float32), tl.zeros_like(x)
    for _ in range(_rounds(_number(at, rate, t, 0))):
        on = square < 16.0
        nx, ny = x * x - y * y + c_x, 2.0 * (x * y) + c_y
        x, y = tl.where(on, nx, x), tl.where(on, ny, y)
        count = tl.where(on, count + 1.0, count)
        square = x * x + y * y
        near = tl.minimum(near, square)
    beyond = log2(log2(between(square, 16.0, 1e6)) * 0.25)
    smooth = count - tl.where(square < 16.0, 0.0, beyond)
    new = smooth * _number(at, rate, t, 3) + tl.sqrt_rn(near) * _number(at, rate, t, 4)
    return limit(x), limit(y), _combined(v, new, at, rate, t, 5)


@triton.jit
def _curve(v, h, at, rate, t):
    kind, u = _number(at, rate, t, 0), v * _number(at, rate, t, 1) + _number(at, rate, t, 2)
    steps = tl.floor(u)
    bent = tl.abs(u)
    if kind >= 1:
        bent = tl.abs(u - 2.0 * tl.floor(u * 0.5 + 0.5))
    if kind >= 2:
        bent = tl.div_rn(u, 1.0 + tl.abs(u))
    if kind >= 3:
        bent = u - steps
    if kind >= 4:
        bent = (steps + 0.5) * _number(at, rate, t, 4)
    return limit(bent * _number(at, rate, t, 3) + h * _number(at, rate, t, 5))


@triton.jit
def _channel(colour, under, cover, u, at, rate, t, SLOT: tl.constexpr):
    tone = wave(u + _number(at, rate, t, SLOT + 6))
    mixed = _number(at, rate, t, SLOT) + _number(at, rate, t, SLOT + 3) * tone
    return between(colour * under + cover * mixed, -1.0, 4.0)


@triton.jit
def _paint(v, h, r, g, b, at, rate, t):
    u = v * _number(at, rate, t, 0) + h * _number(at, rate, t, 1) + _number(at, rate, t, 2)
    cover = _number(at, rate, t, 12) + v * _number(at, rate, t, 13) + tl.abs(v) * _number(at, rate, t, 14)
    cover = between(cover, 0.0, 1.0)
    under = 1.0 - cover * _number(at, rate, t, 15)
    r = _channel(r, under, cover, u, at, rate, t, 3)
    g = _channel(g, under, cover, u, at, rate, t, 4)
    return r, g, _channel(b, under, cover, u, at, rate, t, 5)


@triton.jit
def _shade(x0, y0, v, at, rate, t):
    far = (x0 * x0 + y0 * y0) * _number(at, rate, t, 2)
    return between(_number(at, rate, t, 0) + v * _number(at, rate, t, 1) + far, 0.0, 2.0)


@triton.jit
def run_program(codes, values, rates, t, x0, y0, length):
    """Colour of each pixel at (x0, y0), before clamping."""
    x, y = x0, y0
    v, h = tl.zeros_like(x0), tl.zeros_like(x0)
    r, g, b = tl.zeros_like(x0), tl.zeros_like(x0), tl.zeros_like(x0)
    for k in range(length):
        code, at, rate = tl.load(codes + k), values + k * SLOTS, rates + k * SLOTS
        if code < 11:
            if code == 1:
                x, y = _affine(x0, y0, at, rate, t)
                v, h = tl.zeros_like(x0), tl.zeros_like(x0)
            elif code == 2:
                x, y = _affine(x, y, at, rate, t)
            elif code == 3:
                x, y, v = _fold(x, y, v, at, rate, t)
            elif code == 4:
                x, y = _mirror(x, y, at, rate, t)
            elif code == 5:
                x, y, h = _tile(x, y, at, rate, t)
            elif code == 6:
                x, y = _polar(x, y, at, rate, t)
            elif code == 7:
                x, y = _kaleidoscope(x, y, at, rate, t)
            elif code == 8:
                x, y = _swirl(x, y, at, rate, t)
            elif code == 9:
                x, y = _sine_warp(x, y, at, rate, t)
            elif code == 10:
                x, y = _noise_warp(x, y, at, rate, t)
        else:
            if code == 11:
                v = _waves(x, y, v, at, rate, t)
            elif code == 12:
                v = _rings(x, y, v, at, rate, t)
            elif code == 13:
                v = _gradient(x, y, v, at, rate, t)
            elif code == 14:
                v = _noise(x, y, v, at, rate, t)
            elif code == 15:
                v, h = _worley(x, y, v, at, rate, t)
            elif code == 16:
                v = _shapes(x, y, v, at, rate, t)
            elif code == 17:
                x, y, v = _julia(x, y, v, at, rate, t)
            elif code == 18:
                v = _curve(v, h, at, rate, t)
            elif code == 19:
                r, g, b = _paint(v, h, r, g, b, at, rate, t)
            elif code == 20:
                light = _shade(x0, y0, v, at, rate, t)
                r, g, b = r * light, g * light, b * light
    return r, g, b
