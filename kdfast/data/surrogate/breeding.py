"""New shader programs from old ones: mutation and crossover, closed under the grammar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kdfast.data.surrogate.grammar import draw_background, draw_bend, draw_layer, repaint
from kdfast.data.surrogate.instructions import Rng
from kdfast.data.surrogate.programs import (
    MAX_INSTRUCTIONS,
    MAX_NUMBER,
    OPERATIONS,
    RANGED,
    Instruction,
    Program,
)


def mutate(program: Program, *, seed: int) -> Program:
    """A program with one thing changed: a bend more or less, another layer, other colours, or other numbers.

    Args:
        program: The parent.
        seed: Which mutant, at least 0.

    Returns:
        Another program; it need not pass :func:`usable`, which :func:`widen` sees to.
    """
    return _mutate(program, np.random.default_rng(_checked(seed)))


def crossover(first: Program, second: Program, *, seed: int) -> Program:
    """A program with layers of both parents: the background of one, and a selection of both's other layers.

    Args:
        first: Gives the background.
        second: Gives at least one layer.
        seed: Which child, at least 0.
    """
    return _crossover(first, second, np.random.default_rng(_checked(seed)))


def breed(programs: Sequence[Program], rng: Rng) -> Program:
    """A child of one or two of ``programs``, half the time a mutant of a crossing."""
    first, second = (programs[int(rng.integers(len(programs)))] for _ in range(2))
    if first == second or rng.uniform() < 0.3:
        return _mutate(first, rng)
    child = _crossover(first, second, rng)
    return _mutate(child, rng) if rng.uniform() < 0.5 else child


def _checked(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"seed: got {seed}; must be at least 0")
    return seed


def _mutate(program: Program, rng: Rng) -> Program:
    found = list(program.instructions)
    bends = [i for i, instruction in enumerate(found) if i and instruction.op in _BENDING]
    kind = rng.uniform()
    if kind < 0.25 and len(found) < MAX_INSTRUCTIONS:
        views = [i for i, instruction in enumerate(found) if instruction.op == "view"]
        found.insert(1 + views[int(rng.integers(len(views)))] if views else 0, draw_bend(rng))
    elif kind < 0.4 and bends:
        found[bends[int(rng.integers(len(bends)))]] = draw_bend(rng)
    elif kind < 0.5 and bends:
        del found[bends[int(rng.integers(len(bends)))]]
    elif kind < 0.7:
        layers = list(program.layers)
        at = int(rng.integers(len(layers)))
        layers[at] = tuple(draw_layer(rng) if at else draw_background(rng))
        found = [instruction for layer in layers for instruction in layer][:MAX_INSTRUCTIONS]
    elif kind < 0.85:
        found = [
            repaint(instruction, rng) if instruction.op == "paint" else instruction for instruction in found
        ]
    else:
        found = [_jittered(instruction, rng) for instruction in found]
    return Program(tuple(found))


_BENDING = frozenset(
    ("affine", "mirror", "tile", "polar", "kaleidoscope", "swirl", "sine_warp", "noise_warp")
)


def _jittered(instruction: Instruction, rng: Rng) -> Instruction:
    """Every number moved by about a quarter of itself, counts by one, within what is accepted."""
    values = []
    for name, value in zip(OPERATIONS[instruction.op], instruction.values, strict=True):
        low, high = RANGED.get((instruction.op, name), (-MAX_NUMBER, MAX_NUMBER))
        if name in ("rounds", "octaves", "count", "sectors", "arms", "key", "kind") and value == round(value):
            moved = value + float(rng.integers(-1, 2))
        else:
            moved = value * (1 + 0.25 * float(rng.standard_normal()))
        values.append(min(max(moved, low), high))
    return replace(instruction, values=tuple(values))


def _crossover(first: Program, second: Program, rng: Rng) -> Program:
    background, *ours = first.layers
    _, *theirs = second.layers
    theirs = theirs or [second.layers[0]]
    chosen = [layer for layer in ours if rng.uniform() < 0.5]
    picked = [layer for layer in theirs if rng.uniform() < 0.6] or [theirs[int(rng.integers(len(theirs)))]]
    if len(second.layers) == 1:  # a lone background would hide everything under it: it becomes the ground
        background, picked = second.layers[0], [*ours] or [tuple(draw_layer(rng))]
        chosen = []
    found = [*background, *(instruction for layer in [*chosen, *picked] for instruction in layer)]
    return Program(tuple(found[:MAX_INSTRUCTIONS]))
