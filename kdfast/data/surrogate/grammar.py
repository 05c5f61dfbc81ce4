"""The grammar that random shader programs are drawn from, and how two programs make a third.

A program is a background and up to three layers over it. A layer starts at the pixel (``view``), bends the plane
(folds, mirrors, tilings, polar maps, warps), measures a field there (waves, noise, cells, shapes, escape times),
bends that through a curve, and is painted with a cosine palette through a mask. Every choice is a draw of one
generator, so that a seed names a program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kdfast.data.surrogate.programs import MAX_INSTRUCTIONS, OPERATIONS, Instruction, Program

Rng = np.random.Generator


@dataclass
class _Draw:
    """Collects an instruction's numbers by name."""

    rng: Rng

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def octave(self, low: float, high: float) -> float:
        """Between two positive numbers, evenly over their ratio."""
        return float(low * (high / low) ** self.rng.uniform())

    def sign(self) -> float:
        return 1.0 if self.rng.uniform() < 0.5 else -1.0

    def chance(self, probability: float) -> bool:
        return bool(self.rng.uniform() < probability)

    def whole(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(self.rng.integers(low, high + 1))

    def of(self, *choices: float) -> float:
        return choices[int(self.rng.integers(len(choices)))]

    def loops(self, probability: float = 0.5) -> float:
        """A rate in whole turns, so that the picture comes back after a unit of time."""
        return self.of(-1.0, 1.0) if self.chance(probability) else 0.0

    def mix(self, first: bool) -> dict[str, float]:
        """How a field joins the one before it: in its place, on top, against it, or times it."""
        if first:
            return {"keep": 0.0, "add": 1.0, "times": 0.0}
        kind = self.rng.uniform()
        if kind < 0.45:
            return {"keep": 1.0, "add": self.between(0.3, 1.0) * self.sign(), "times": 0.0}
        if kind < 0.8:
            return {"keep": self.between(0.0, 0.4), "add": 0.0, "times": self.between(0.8, 1.6)}
        return {"keep": 0.7, "add": 0.5, "times": self.between(-0.6, 0.6)}


def _make(op: str, values: dict[str, float], rates: dict[str, float] | None = None) -> Instruction:
    names, moving = OPERATIONS[op], rates or {}
    return Instruction(op, tuple(values[n] for n in names), tuple(moving.get(n, 0.0) for n in names))


# --- bending the plane -------------------------------------------------------------------------------------------


def _view(d: _Draw) -> Instruction:
    zoom = d.octave(0.6, 2.4)
    values = {
        "turn": d.between(-0.5, 0.5) if d.chance(0.7) else 0.0,
        "zoom_x": zoom,
        "zoom_y": zoom * (d.octave(0.6, 1.6) if d.chance(0.4) else 1.0),
        "shift_x": d.between(-0.8, 0.8),
        "shift_y": d.between(-0.8, 0.8),
    }
    return _make("view", values, {"turn": d.loops(0.25), "shift_x": d.between(-0.5, 0.5)})


def _affine(d: _Draw) -> Instruction:
    scale = d.octave(0.5, 2.0)
    values = {
        "turn": d.between(-0.5, 0.5),
        "scale_x": scale,
        "scale_y": scale * d.octave(0.4, 2.5),
        "shift_x": d.between(-1.0, 1.0),
        "shift_y": d.between(-1.0, 1.0),
    }
    return _make("affine", values, {"turn": d.loops(0.3)})


def _fold(d: _Draw, first: bool = False) -> Instruction:
    values = {
        "rounds": float(d.whole(2, 7)),
        "shift_x": d.between(0.35, 1.15),
        "shift_y": d.between(0.2, 1.1),
        "decay": d.between(0.55, 0.95),
        "gain": d.between(0.25, 0.7),
        **d.mix(first),
    }
    return _make("fold", values, {"shift_x": d.between(-0.1, 0.1), "shift_y": d.between(-0.1, 0.1)})


def _mirror(d: _Draw) -> Instruction:
    values = {
        "rounds": float(d.whole(1, 5)),
        "turn": d.between(-0.25, 0.25),
        "shift_x": d.between(0.1, 0.8),
        "shift_y": d.between(0.0, 0.6),
        "scale": d.octave(0.95, 1.6),
    }
    return _make("mirror", values, {"turn": d.loops(0.3)})


def _tile(d: _Draw) -> Instruction:
    count = d.octave(0.8, 3.0)
    values = {
        "columns": count,
        "rows": count * (d.octave(0.5, 2.0) if d.chance(0.4) else 1.0),
        "stagger": d.of(0.0, 0.0, 0.5, 0.3333333),
        "mirrored": 1.0 if d.chance(0.5) else 0.0,
        "scale": d.between(1.2, 2.6),
        "key": float(d.whole(0, 4000)),
    }
    return _make("tile", values)


def _polar(d: _Draw) -> Instruction:
    tunnel = d.chance(0.35)
    values = {
        "arms": float(d.whole(1, 6)),
        "spiral": d.between(-1.2, 1.2) if d.chance(0.6) else 0.0,
        "octaves": 0.0 if tunnel else d.between(0.3, 1.3),
        "linear": d.between(0.0, 1.5) if d.chance(0.4) else 0.0,
        "tunnel": d.between(0.2, 0.8) if tunnel else 0.0,
        "shift_x": d.between(0.0, 1.0),
        "shift_y": d.between(0.0, 1.0),
    }
    return _make("polar", values, {"shift_y": d.loops(0.8), "shift_x": d.loops(0.3)})


def _kaleidoscope(d: _Draw) -> Instruction:
    values = {"sectors": float(d.whole(2, 9)), "turn": d.between(0.0, 1.0), "offset": d.between(0.0, 1.0)}
    return _make("kaleidoscope", values, {"offset": d.loops(0.4)})


def _swirl(d: _Draw) -> Instruction:
    values = {
        "turns": d.between(0.3, 1.6) * d.sign(),
        "narrow": d.octave(0.7, 6.0),
        "centre_x": d.between(-0.6, 0.6),
        "centre_y": d.between(-0.6, 0.6),
    }
    return _make("swirl", values, {"turns": d.between(-0.5, 0.5)})


def _sine_warp(d: _Draw) -> Instruction:
    values = {
        "rounds": float(d.whole(1, 4)),
        "amplitude": d.between(0.08, 0.4),
        "frequency": d.octave(0.2, 1.1),
        "decay": d.between(0.5, 0.85),
        "growth": d.between(1.3, 2.1),
        "phase_x": d.between(0.0, 1.0),
        "phase_y": d.between(0.0, 1.0),
    }
    return _make("sine_warp", values, {"phase_x": d.loops(0.7), "phase_y": d.loops(0.7)})


def _noise_warp(d: _Draw) -> Instruction:
    values = {
        "octaves": float(d.whole(1, 4)),
        "amplitude": d.octave(0.15, 0.9),
        "frequency": d.octave(0.6, 2.5),
        "decay": d.between(0.4, 0.65),
        "key": float(d.whole(0, 4000)),
        "shift_x": 0.0,
        "shift_y": 0.0,
    }
    return _make("noise_warp", values, {"shift_x": d.between(-0.6, 0.6), "shift_y": d.between(-0.6, 0.6)})


# --- fields ------------------------------------------------------------------------------------------------------


def _waves(d: _Draw, first: bool) -> Instruction:
    angle, frequency = d.between(0.0, 6.2832), d.octave(0.3, 2.2)
    values = {
        "frequency_x": frequency * float(np.cos(angle)),
        "frequency_y": frequency * float(np.sin(angle)),
        "phase": d.between(0.0, 1.0),
        "gain": d.between(0.5, 1.0),
        **d.mix(first),
    }
    return _make("waves", values, {"phase": d.loops(0.7)})


def _rings(d: _Draw, first: bool) -> Instruction:
    values = {
        "frequency": d.octave(0.4, 3.0),
        "centre_x": d.between(-0.6, 0.6),
        "centre_y": d.between(-0.6, 0.6),
        "phase": d.between(0.0, 1.0),
        "gain": d.between(0.5, 1.0),
        **d.mix(first),
    }
    return _make("rings", values, {"phase": d.loops(0.7)})


def _gradient(d: _Draw, first: bool) -> Instruction:
    values = {
        "slope_x": d.between(-0.7, 0.7),
        "slope_y": d.between(-0.7, 0.7),
        "slope_radius": d.between(-0.8, 0.8) if d.chance(0.5) else 0.0,
        "offset": d.between(-0.4, 0.4),
        **d.mix(first),
    }
    return _make("gradient", values)


def _noise(d: _Draw, first: bool) -> Instruction:
    values = {
        "octaves": float(d.whole(2, 5)),
        "frequency": d.octave(0.7, 4.0),
        "decay": d.between(0.4, 0.65),
        "key": float(d.whole(0, 4000)),
        "ridged": 1.0 if d.chance(0.35) else 0.0,
        "gain": d.between(0.7, 1.3),
        **d.mix(first),
    }
    return _make("noise", values)


def _worley(d: _Draw, first: bool) -> Instruction:
    borders = d.chance(0.5)
    values = {
        "frequency": d.octave(0.8, 3.5),
        "key": float(d.whole(0, 4000)),
        "jitter": d.between(0.6, 1.0),
        "nearest": 0.0 if borders else 1.2 * d.sign(),
        "border": 1.5 if borders else d.between(0.0, 0.5),
        "offset": d.between(-0.5, 0.1),
        **d.mix(first),
    }
    return _make("worley", values)


def _shapes(d: _Draw, first: bool) -> Instruction:
    values = {
        "kind": float(d.whole(0, 4)),
        "count": float(d.whole(1, 6)),
        "size": d.between(0.2, 0.7),
        "turn": d.between(-0.3, 0.3),
        "shift_x": d.between(-0.8, 0.8),
        "shift_y": d.between(-0.8, 0.8),
        "shrink": d.octave(0.9, 1.7),
        "hollow": d.between(0.03, 0.2) if d.chance(0.45) else 0.0,
        "gain": d.octave(1.0, 2.5),
        **d.mix(first),
    }
    return _make("shapes", values, {"turn": d.loops(0.5)})


def _julia(d: _Draw, first: bool) -> Instruction:
    # Around the main cardioid's rim, where Julia sets have the most to show.
    turn, inside = d.between(0.0, 1.0), d.between(0.92, 1.12)
    angle = 2.0 * np.pi * turn
    c = inside * (0.5 * np.exp(1j * angle) - 0.25 * np.exp(2j * angle))
    values = {
        "rounds": float(d.whole(5, 14)),
        "c_x": float(c.real),
        "c_y": float(c.imag),
        "count": d.between(0.1, 0.35),
        "trap": d.between(0.0, 1.2),
        **d.mix(first),
    }
    return _make("julia", values, {"c_x": d.between(-0.05, 0.05), "c_y": d.between(-0.05, 0.05)})


def _curve(d: _Draw) -> Instruction:
    kind = float(d.of(0, 1, 1, 2, 2, 3, 4, 4))
    values = {
        "kind": kind,
        "slope": d.octave(0.8, 3.0),
        "offset": d.between(-0.5, 0.5),
        "gain": d.between(0.7, 1.2),
        "steps": d.between(0.25, 0.6),
        "cell": d.between(0.3, 1.5) if d.chance(0.4) else 0.0,
    }
    return _make("curve", values)


# --- colour ------------------------------------------------------------------------------------------------------


def _palette(d: _Draw) -> dict[str, float]:
    """Base, swing and phase of each channel: a wheel of hues, two tones, or one tone from dark to light."""
    style, names = d.rng.uniform(), ("r", "g", "b")
    if style < 0.4:  # hues apart by about a third of a turn
        base = [d.between(0.4, 0.62) for _ in names]
        swing = [d.between(0.28, 0.5) for _ in names]
        start, spread = d.between(0.0, 1.0), d.between(0.12, 0.34) * d.sign()
        phase = [start + spread * k + d.between(-0.05, 0.05) for k in range(3)]
    elif style < 0.75:  # from one colour to another
        ends = [(d.between(0.0, 1.0), d.between(0.0, 1.0)) for _ in names]
        base = [0.5 * (a + b) for a, b in ends]
        swing = [0.5 * (a - b) for a, b in ends]
        start = d.between(0.0, 1.0)
        phase = [start + d.between(-0.06, 0.06) for _ in names]
    elif style < 0.9:  # shades of one colour
        tint = [d.between(0.35, 1.0) for _ in names]
        base, swing = [0.5 * t for t in tint], [0.48 * t for t in tint]
        phase = [d.between(0.0, 1.0)] * 3
    else:  # ink: from black to white, or nearly
        base, swing, phase = [0.5] * 3, [d.between(0.4, 0.5)] * 3, [d.between(0.0, 1.0)] * 3
    found = {}
    for what, numbers in (("base", base), ("swing", swing), ("phase", phase)):
        found |= {f"{what}_{name}": number for name, number in zip(names, numbers)}
    return found


def _paint(d: _Draw, background: bool) -> Instruction:
    values = {
        "slope": d.octave(0.15, 0.9) * d.sign(),
        "cell": d.between(0.2, 1.0) if d.chance(0.6) else 0.0,
        "phase": d.between(0.0, 1.0),
        **_palette(d),
        "cover": 1.0,
        "cover_slope": 0.0,
        "cover_distance": 0.0,
        "opacity": 1.0,
    }
    if not background:
        kind, sharp = d.rng.uniform(), d.octave(1.5, 40.0)
        if kind < 0.5:  # where the field is below (or above) a level
            values |= {"cover": 0.5 + sharp * d.between(-0.3, 0.3), "cover_slope": sharp * d.sign()}
        elif kind < 0.75:  # along the field's zero line
            width = d.octave(0.04, 0.3)
            values |= {"cover": 0.5 + sharp * width, "cover_distance": -sharp}
        elif kind < 0.9:  # light added to what is there
            values |= {"cover": d.between(0.5, 1.0), "cover_distance": -d.octave(0.8, 5.0), "opacity": 0.0}
        else:  # a veil
            values |= {"cover": d.between(0.3, 0.6)}
        if values["opacity"] and d.chance(0.3):
            values["opacity"] = d.between(0.5, 0.9)
    return _make("paint", values, {"phase": d.loops(0.5)})


def _shade(d: _Draw) -> Instruction:
    values = {"light": d.between(0.95, 1.2), "slope": d.between(-0.4, 0.4), "vignette": -d.between(0.0, 0.25)}
    return _make("shade", values)


_BENDS: tuple[tuple[Callable[[_Draw], Instruction], float], ...] = (
    (_affine, 0.7),
    (_mirror, 1.3),
    (_tile, 1.2),
    (_polar, 1.0),
    (_kaleidoscope, 1.0),
    (_swirl, 0.8),
    (_sine_warp, 1.5),
    (_noise_warp, 1.4),
    (_fold, 0.8),
)
_FIELDS: tuple[tuple[Callable[[_Draw, bool], Instruction], float], ...] = (
    (_waves, 1.0),
    (_rings, 0.8),
    (_gradient, 0.8),
    (_noise, 1.2),
    (_worley, 1.2),
    (_shapes, 1.5),
    (_julia, 0.8),
    (_fold, 0.9),
)


def _pick(
    d: _Draw, weighted: tuple[tuple[Callable[..., Instruction], float], ...]
) -> Callable[..., Instruction]:
    weights = np.array([weight for _, weight in weighted])
    return weighted[int(d.rng.choice(len(weighted), p=weights / weights.sum()))][0]


def _plain(d: _Draw) -> list[Instruction]:
    """A ground with hardly anything on it, so that what comes over it stands alone: dark, light or tinted."""
    level = d.of(0.0, 0.0, 0.05, 0.95, 0.5) + d.between(-0.05, 0.05)
    tint = [level + d.between(-0.12, 0.12) for _ in range(3)]
    names = OPERATIONS["paint"]
    values = dict.fromkeys(names, 0.0) | {"slope": d.between(0.05, 0.2), "cover": 1.0, "opacity": 1.0}
    for channel, base in zip(("r", "g", "b"), tint):
        values |= {f"base_{channel}": base, f"swing_{channel}": d.between(0.0, 0.12)}
    return [_view(d), _gradient(d, True), _make("paint", values)]


def _layer(d: _Draw, background: bool) -> list[Instruction]:
    bends = int(d.rng.choice(4, p=[0.15, 0.35, 0.32, 0.18]))
    fields = int(d.rng.choice([1, 2, 3], p=[0.5, 0.38, 0.12]))
    found = [_view(d), *(_pick(d, _BENDS)(d) for _ in range(bends))]
    for k in range(fields):
        if k and d.chance(0.35):
            found.append(_pick(d, _BENDS)(d))
        found.append(_pick(d, _FIELDS)(d, k == 0))
    if d.chance(0.45):
        found.append(_curve(d))
    return [*found, _paint(d, background)]


def draw_bend(rng: Rng) -> Instruction:
    """An instruction that bends the plane."""
    return _pick(_Draw(rng), _BENDS)(_Draw(rng))


def draw_background(rng: Rng) -> list[Instruction]:
    """A layer that covers everything."""
    return _layer(_Draw(rng), True)


def draw_layer(rng: Rng) -> list[Instruction]:
    """A layer that leaves something of what is under it."""
    return _layer(_Draw(rng), False)


def repaint(paint: Instruction, rng: Rng) -> Instruction:
    """The same layer in other colours."""
    d, names = _Draw(rng), OPERATIONS["paint"]
    values = dict(zip(names, paint.values, strict=True)) | _palette(d) | {"phase": d.between(0.0, 1.0)}
    return _make("paint", values, dict(zip(names, paint.rates, strict=True)))


def draw_program(rng: Rng) -> Program:
    """One program from the grammar, by the draws of ``rng`` alone."""
    d = _Draw(rng)
    alone = d.chance(0.3)
    found = _plain(d) if alone else draw_background(rng)
    for _ in range(int(rng.choice(4, p=[0.0, 0.6, 0.28, 0.12] if alone else [0.15, 0.4, 0.3, 0.15]))):
        found += draw_layer(rng)
    if d.chance(0.5):
        found.append(_shade(d))
    return Program(tuple(found[:MAX_INSTRUCTIONS]))
