"""Functions that procedural images are made of, from operations that every backend rounds alike.

Only +, −, ×, ÷, √, floor, min, max and integer arithmetic, one rounding each: a CPU, Triton's interpreter and a GPU
(without fused multiply-add) get the same bits, so that an image is a pure function of its program. Sines and
logarithms are polynomials for that reason; their errors are stated, and do not matter to a picture.
kernels/procedural/arithmetic.py says the same in Triton, operation by operation.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Coordinates and fields are kept within ±LIMIT: then nothing overflows, and no NaN can arise.
LIMIT = 8192.0


def wave(turns: Tensor) -> Tensor:
    """sin(2π·turns), to 6e-7."""
    u = turns - torch.floor(turns + 0.5)
    a = u.abs()
    f = torch.minimum(a, 0.5 - a)
    w = f * f
    s = f * (w * (w * (w * -70.99356555 + 81.34078436) + -41.33714291) + 6.28316405)
    return torch.where(u < 0, -s, s)


def turns_of(x: Tensor, y: Tensor) -> Tensor:
    """atan2(y, x)/2π in (−½, ½], to 2e-6; 0 at the origin."""
    ax, ay = x.abs(), y.abs()
    a = torch.minimum(ax, ay) / torch.maximum(ax, ay).clamp(min=1e-12)
    w = a * a
    t = a * (w * (w * (w * (w * 0.00331759 + -0.01355304) + 0.02867325) + -0.05256965) + 0.15913367)
    t = torch.where(ay > ax, 0.25 - t, t)
    t = torch.where(x < 0, 0.5 - t, t)
    return torch.where(y < 0, -t, t)


def log2(x: Tensor) -> Tensor:
    """Base-2 logarithm of positive, normal numbers, to 1e-5."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits >> 23) - 127
    f = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1.0
    p = f * -0.03538527 + 0.14840927
    p = p * f + -0.30511895
    p = p * f + 0.46991958
    p = p * f + -0.72051966
    p = p * f + 1.4426848
    return exponent.to(torch.float32) + f * p


def root(x: Tensor) -> Tensor:
    """√x, correctly rounded, which torch's own is not on a CPU."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sqrt(x.numpy()))
    return torch.sqrt(x.double()).float()  # rounded once more: the same as rounded once


def length(x: Tensor, y: Tensor) -> Tensor:
    """√(x² + y²)."""
    return root(x * x + y * y)


def rotate(x: Tensor, y: Tensor, sine: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y) turned by an angle given by its sine and cosine."""
    return cosine * x - sine * y, sine * x + cosine * y


def limit(x: Tensor) -> Tensor:
    """Kept within ±LIMIT."""
    return x.clamp(-LIMIT, LIMIT)


def lattice_hash(ix: Tensor, iy: Tensor, seed: Tensor) -> Tensor:
    """32 well-mixed bits (int32) for each lattice point and seed."""
    # Products wrap around, as 32-bit multiplications do everywhere; the masks make the shifts logical.
    h = ix * 0x27D4EB2D + iy * 0x165667B1 + seed
    h = (h ^ ((h >> 15) & 0x1FFFF)) * 0x2C1B3C6D
    h = (h ^ ((h >> 12) & 0xFFFFF)) * 0x297A2D39
    return h ^ ((h >> 15) & 0x1FFFF)


def unit_low(h: Tensor) -> Tensor:
    """The lower 16 bits as a number in [0, 1)."""
    return (h & 0xFFFF).to(torch.float32) * 0.0000152587890625


def unit_high(h: Tensor) -> Tensor:
    """The upper 16 bits as a number in [0, 1)."""
    return ((h >> 16) & 0xFFFF).to(torch.float32) * 0.0000152587890625


def value_noise(x: Tensor, y: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent smooth fields in [0, 1): hashed lattice values, blended by 3u² − 2u³."""
    fx, fy = torch.floor(x), torch.floor(y)
    ix, iy = fx.to(torch.int32), fy.to(torch.int32)
    u, v = x - fx, y - fy
    u = u * u * (3.0 - 2.0 * u)
    v = v * v * (3.0 - 2.0 * v)
    corners = [lattice_hash(ix + dx, iy + dy, seed) for dy in (0, 1) for dx in (0, 1)]
    found = []
    for part in (unit_low, unit_high):
        a, b, c, d = (part(h) for h in corners)
        top = a + (b - a) * u
        bottom = c + (d - c) * u
        found.append(top + (bottom - top) * v)
    return found[0], found[1]


def pixel_grid(height: int, width: int, antialias: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y of each sample ``[antialias², H·W]``: the shorter side spans [−1, 1], y points up."""
    scale = torch.tensor(2.0 / (min(height, width) * antialias), dtype=torch.float32, device=device)
    row = torch.arange(height * antialias, dtype=torch.float32, device=device)
    column = torch.arange(width * antialias, dtype=torch.float32, device=device)
    y = (0.5 * (height * antialias) - (row + 0.5)) * scale
    x = ((column + 0.5) - 0.5 * (width * antialias)) * scale
    ys = y.view(height, antialias, 1, 1).expand(-1, -1, width, antialias)
    xs = x.view(1, 1, width, antialias).expand(height, antialias, -1, -1)
    order = (1, 3, 0, 2)
    return (xs.permute(order).reshape(antialias**2, -1), ys.permute(order).reshape(antialias**2, -1))
