"""The grammar that random shader programs are drawn from, and how two programs make a third.

A program is a background and up to three layers over it. A layer starts at the pixel (``view``), bends the plane
(folds, mirrors, tilings, polar maps, warps), measures a field there (waves, noise, cells, shapes, escape times),
bends that through a curve, and is painted with a cosine palette through a mask. Every choice is a draw of one
generator, so that a seed names a program.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kdfast.data.surrogate.instructions import (
    Draw,
    Rng,
    affine,
    curve,
    fold,
    gradient,
    julia,
    kaleidoscope,
    make,
    mirror,
    noise,
    noise_warp,
    paint,
    palette,
    polar,
    rings,
    shade,
    shapes,
    sine_warp,
    swirl,
    tile,
    view,
    waves,
    worley,
)
from kdfast.data.surrogate.programs import MAX_INSTRUCTIONS, OPERATIONS, Instruction, Program

_BENDS: tuple[tuple[Callable[[Draw], Instruction], float], ...] = (
    (affine, 0.7),
    (mirror, 1.3),
    (tile, 1.2),
    (polar, 1.0),
    (kaleidoscope, 1.0),
    (swirl, 0.8),
    (sine_warp, 1.5),
    (noise_warp, 1.4),
    (fold, 0.8),
)
_FIELDS: tuple[tuple[Callable[[Draw, bool], Instruction], float], ...] = (
    (waves, 1.0),
    (rings, 0.8),
    (gradient, 0.8),
    (noise, 1.2),
    (worley, 1.2),
    (shapes, 1.5),
    (julia, 0.8),
    (fold, 0.9),
)


def _pick(
    d: Draw, weighted: tuple[tuple[Callable[..., Instruction], float], ...]
) -> Callable[..., Instruction]:
    weights = np.array([weight for _, weight in weighted])
    return weighted[int(d.rng.choice(len(weighted), p=weights / weights.sum()))][0]


def _plain(d: Draw) -> list[Instruction]:
    """A ground with hardly anything on it, so that what comes over it stands alone: dark, light or tinted."""
    level = d.of(0.0, 0.0, 0.05, 0.95, 0.5) + d.between(-0.05, 0.05)
    tint = [level + d.between(-0.12, 0.12) for _ in range(3)]
    names = OPERATIONS["paint"]
    values = dict.fromkeys(names, 0.0) | {"slope": d.between(0.05, 0.2), "cover": 1.0, "opacity": 1.0}
    for channel, base in zip(("r", "g", "b"), tint):
        values |= {f"base_{channel}": base, f"swing_{channel}": d.between(0.0, 0.12)}
    return [view(d), gradient(d, True), make("paint", values)]


def _layer(d: Draw, background: bool) -> list[Instruction]:
    bends = int(d.rng.choice(4, p=[0.15, 0.35, 0.32, 0.18]))
    fields = int(d.rng.choice([1, 2, 3], p=[0.5, 0.38, 0.12]))
    found = [view(d), *(_pick(d, _BENDS)(d) for _ in range(bends))]
    for k in range(fields):
        if k and d.chance(0.35):
            found.append(_pick(d, _BENDS)(d))
        found.append(_pick(d, _FIELDS)(d, k == 0))
    if d.chance(0.45):
        found.append(curve(d))
    return [*found, paint(d, background)]


def draw_bend(rng: Rng) -> Instruction:
    """An instruction that bends the plane."""
    return _pick(Draw(rng), _BENDS)(Draw(rng))


def draw_background(rng: Rng) -> list[Instruction]:
    """A layer that covers everything."""
    return _layer(Draw(rng), True)


def draw_layer(rng: Rng) -> list[Instruction]:
    """A layer that leaves something of what is under it."""
    return _layer(Draw(rng), False)


def repaint(paint: Instruction, rng: Rng) -> Instruction:
    """The same layer in other colours."""
    d, names = Draw(rng), OPERATIONS["paint"]
    values = dict(zip(names, paint.values, strict=True)) | palette(d) | {"phase": d.between(0.0, 1.0)}
    return make("paint", values, dict(zip(names, paint.rates, strict=True)))


def draw_program(rng: Rng) -> Program:
    """One program from the grammar, by the draws of ``rng`` alone."""
    d = Draw(rng)
    alone = d.chance(0.3)
    found = _plain(d) if alone else draw_background(rng)
    for _ in range(int(rng.choice(4, p=[0.0, 0.6, 0.28, 0.12] if alone else [0.15, 0.4, 0.3, 0.15]))):
        found += draw_layer(rng)
    if d.chance(0.5):
        found.append(shade(d))
    return Program(tuple(found[:MAX_INSTRUCTIONS]))
