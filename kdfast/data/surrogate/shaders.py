"""Images from random procedural programs: folds, tilings, warps, noise, cells, shapes, palettes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kdfast.data.surrogate.breeding import breed
from kdfast.data.surrogate.grammar import draw_program
from kdfast.data.surrogate.programs import Program, table
from kdfast.ops.procedural.shaders import render_shaders
from kdfast.reference.procedural import shaders as reference

#: Draws of one program before giving up; about one in twenty is refused.
_ATTEMPTS = 64
#: What programs are judged by: small, and at time 0.
_TRIAL = 32
_BATCH = 64
#: Other times that a frame without anything to see is taken at.
_RETRIES = 4
#: Successive frames of a program lie this far apart, so that any number of them spread over its loop.
_GOLDEN = 0.6180339887498949


def usable(images: torch.Tensor) -> torch.Tensor:
    """Which images have something to show: the filter that shader images pass.

    Refused are images with a NaN, of at most two colours, or with less than 2 % of their pixels off the most frequent
    colour. Colours are counted at five bits a channel, and a pixel is off when a channel differs by two such steps.

    Args:
        images: ``[N, 3, H, W]``, uint8, or floating-point in [0, 1].

    Returns:
        bool ``[N]``, on the images' device.

    Raises:
        ValueError: Another shape.

    Source: "What Makes a Good Dataset for Knowledge Distillation?", Sec. 3 (the thresholds are ours).
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images: got shape {tuple(images.shape)}; [N, 3, H, W] is needed")
    finite = torch.ones(len(images), dtype=torch.bool, device=images.device)
    if images.is_floating_point():
        finite = images.flatten(1).isfinite().all(1)
        images = (images.nan_to_num(0.0).clamp(0, 1) * 255).to(torch.uint8)
    pixels = images.shape[2] * images.shape[3]
    found = [finite.new_empty(0)]
    for part in torch.split(images, _BATCH):
        r, g, b = (part[:, k].long() >> 3 for k in range(3))
        colour = (r << 10 | g << 5 | b).flatten(1)
        # One histogram for the batch: each image has its own 32768 bins.
        offset = torch.arange(len(part), device=images.device)[:, None] << 15
        counts = torch.bincount((colour + offset).flatten(), minlength=len(part) << 15).view(
            len(part), 1 << 15
        )
        mode = counts.argmax(1)
        far = torch.zeros_like(colour, dtype=torch.bool)
        for channel, shift in ((r, 10), (g, 5), (b, 0)):
            far |= (channel.flatten(1) - (mode >> shift & 31)[:, None]).abs() > 1
        found.append(((counts > 0).sum(1) > 2) & (far.sum(1) >= 0.02 * pixels))
    return torch.cat(found) & finite


def random_programs(n: int, *, seed: int, start: int = 0) -> list[Program]:
    """Random shader programs whose images pass :func:`usable`.

    Program ``i`` depends on ``(seed, start + i)`` alone. Programs differ in structure, not in their numbers alone:
    one to four layers, each of up to fifteen operations out of twenty.

    Args:
        n: How many.
        seed: At least 0.
        start: Number of the first.

    Raises:
        ValueError: An argument is negative.
    """
    if n < 0 or start < 0 or seed < 0:
        raise ValueError(f"n, start, seed: got {n}, {start}, {seed}; must be at least 0")
    return _drawn(seed, range(start, start + n))


def widen(programs: Sequence[Program], n: int, *, seed: int) -> list[Program]:
    """New programs bred from old ones by crossover and mutation, all of which pass :func:`usable`.

    Args:
        programs: At least one.
        n: How many new ones.
        seed: At least 0.

    Returns:
        The children alone; child ``i`` depends on ``(programs, seed, i)``.

    Raises:
        ValueError: No programs, or a negative number.
    """
    if not programs:
        raise ValueError("programs: got none; at least one is needed")
    if n < 0 or seed < 0:
        raise ValueError(f"n, seed: got {n}, {seed}; must be at least 0")

    def child(i: int, attempt: int) -> Program:
        return breed(programs, np.random.default_rng([seed, i, attempt]))

    return _filtered(n, child)


def shaders(
    n: int,
    shape: tuple[int, int],
    *,
    seed: int = 0,
    start: int = 0,
    programs: int | Sequence[Program] = 4096,
    antialias: int = 2,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Images of random procedural shader programs.

    Image ``i`` is program ``i mod P`` at a time that depends on ``i // P``; it is determined by ``(seed, start + i)``
    and P alone, so that a set can be made in pieces, and is the same on every backend to the last bit. A frame that
    does not pass :func:`usable` is taken at another time.

    Args:
        n: Number of images.
        shape: Height and width.
        seed: Of the programs, at least 0.
        start: Index of the first image.
        programs: P, how many random programs there are, or the programs themselves (``seed`` is then not used).
        antialias: Samples a pixel and side: 2 averages four. 1 is four times as fast, and grainier.
        device: Where to render.

    Returns:
        uint8 ``[n, 3, H, W]`` on ``device``.

    Raises:
        ValueError: An argument is out of range.

    Source: "What Makes a Good Dataset for Knowledge Distillation?", Sec. 3, whose 1089 TwiGL programs these stand in
    for.
    """
    if n < 0 or start < 0 or seed < 0:
        raise ValueError(f"n, start, seed: got {n}, {start}, {seed}; must be at least 0")
    if min(shape) < 1:
        raise ValueError(f"shape: got {shape}; must be positive")
    count = programs if isinstance(programs, int) else len(programs)
    if count < 1:
        raise ValueError(f"programs: got {count}; at least one is needed")
    indices = range(start, start + n)
    numbers = sorted({i % count for i in indices})
    if isinstance(programs, int):
        chosen = _drawn(seed, numbers)
    else:
        chosen = [programs[number] for number in numbers]
    if not chosen:
        return torch.empty(0, 3, *shape, dtype=torch.uint8, device=device)
    at = {number: k for k, number in enumerate(numbers)}
    rows = torch.tensor([at[i % count] for i in indices])
    frames = torch.tensor([i // count for i in indices], dtype=torch.float64)
    return _rendered(chosen, rows, frames, shape, antialias, device)


def _rendered(
    programs: Sequence[Program],
    rows: torch.Tensor,
    frames: torch.Tensor,
    shape: tuple[int, int],
    antialias: int,
    device: torch.device | str,
) -> torch.Tensor:
    lot = table(programs, device)

    def draw(which: torch.Tensor, attempt: int) -> torch.Tensor:
        # Time 0 is what the programs were chosen by, so it comes last.
        time = frames[which] + 0.37 * attempt if attempt < _RETRIES else 0 * frames[which]
        moment = torch.frac(time * _GOLDEN).float().to(device)
        shown = reference.Programs(lot.codes, lot.values, lot.rates, rows[which].to(device), moment)
        return render_shaders(shown, *shape, antialias, torch.uint8)

    images = draw(torch.arange(len(rows)), 0)
    for attempt in range(1, _RETRIES + 1):
        bad = (~usable(images)).nonzero().flatten()
        if not len(bad):
            break
        images[bad] = draw(bad.cpu(), attempt)
    return images


#: Programs drawn so far, by seed and number: a set is usually asked for in pieces.
_memory: dict[tuple[int, int], Program] = {}
_REMEMBERED = 1 << 15


def _drawn(seed: int, numbers: Sequence[int]) -> list[Program]:
    missing = [number for number in numbers if (seed, number) not in _memory]
    if len(_memory) + len(missing) > _REMEMBERED:
        _memory.clear()
        missing = list(numbers)
    fresh = _filtered(len(missing), lambda i, attempt: _draw(seed, missing[i], attempt))
    _memory.update({(seed, number): program for number, program in zip(missing, fresh, strict=True)})
    return [_memory[seed, number] for number in numbers]


def _draw(seed: int, number: int, attempt: int) -> Program:
    return draw_program(np.random.default_rng([seed, number, attempt]))


def _filtered(n: int, draw: Callable[[int, int], Program]) -> list[Program]:
    """``draw(i, attempt)`` for the first attempt that shows something, for each i."""
    found: dict[int, Program] = {}
    for attempt in range(_ATTEMPTS):
        waiting = [i for i in range(n) if i not in found]
        for first in range(0, len(waiting), _BATCH):
            part = waiting[first : first + _BATCH]
            drawn = [draw(i, attempt) for i in part]
            found |= {i: p for i, p, good in zip(part, drawn, _shows(drawn), strict=True) if good}
        if len(found) == n:
            break
    else:
        raise ValueError(f"programs: {n - len(found)} of {n} show nothing after {_ATTEMPTS} draws each")
    return [found[i] for i in range(n)]


def _shows(programs: Sequence[Program]) -> list[bool]:
    lot, count = table(programs), len(programs)
    # Always on the CPU, where the programs are: the bits are every backend's.
    trial = reference.Programs(lot.codes, lot.values, lot.rates, torch.arange(count), torch.zeros(count))
    shown: list[bool] = usable(reference.render(trial, _TRIAL, _TRIAL, 1, torch.uint8)).tolist()
    return shown
