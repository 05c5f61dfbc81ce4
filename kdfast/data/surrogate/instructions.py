"""Random instructions of shader programs: each function draws the numbers of one operation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdfast.data.surrogate.programs import OPERATIONS, Instruction

Rng = np.random.Generator


@dataclass
class Draw:
    """Collects an instruction's numbers by name."""

    rng: Rng

    def between(self, low: float, high: float) -> float:
        """Evenly between two numbers."""
        return float(self.rng.uniform(low, high))

    def octave(self, low: float, high: float) -> float:
        """Between two positive numbers, evenly over their ratio."""
        return float(low * (high / low) ** self.rng.uniform())

    def sign(self) -> float:
        """Plus or minus one."""
        return 1.0 if self.rng.uniform() < 0.5 else -1.0

    def chance(self, probability: float) -> bool:
        """True so often."""
        return bool(self.rng.uniform() < probability)

    def whole(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(self.rng.integers(low, high + 1))

    def of(self, *choices: float) -> float:
        """One of these."""
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


def make(op: str, values: dict[str, float], rates: dict[str, float] | None = None) -> Instruction:
    """An instruction from its numbers by name; without a rate a number stands still."""
    names, moving = OPERATIONS[op], rates or {}
    return Instruction(op, tuple(values[n] for n in names), tuple(moving.get(n, 0.0) for n in names))


# --- bending the plane -------------------------------------------------------------------------------------------


def view(d: Draw) -> Instruction:
    """A layer's place: zoomed, turned and shifted."""
    zoom = d.octave(0.6, 2.4)
    values = {
        "turn": d.between(-0.5, 0.5) if d.chance(0.7) else 0.0,
        "zoom_x": zoom,
        "zoom_y": zoom * (d.octave(0.6, 1.6) if d.chance(0.4) else 1.0),
        "shift_x": d.between(-0.8, 0.8),
        "shift_y": d.between(-0.8, 0.8),
    }
    return make("view", values, {"turn": d.loops(0.25), "shift_x": d.between(-0.5, 0.5)})


def affine(d: Draw) -> Instruction:
    """Turned, stretched and shifted."""
    scale = d.octave(0.5, 2.0)
    values = {
        "turn": d.between(-0.5, 0.5),
        "scale_x": scale,
        "scale_y": scale * d.octave(0.4, 2.5),
        "shift_x": d.between(-1.0, 1.0),
        "shift_y": d.between(-1.0, 1.0),
    }
    return make("affine", values, {"turn": d.loops(0.3)})


def fold(d: Draw, first: bool = False) -> Instruction:
    """A few rounds of p ← |p|/(p·p) − c, which fold the plane into lace."""
    values = {
        "rounds": float(d.whole(2, 7)),
        "shift_x": d.between(0.35, 1.15),
        "shift_y": d.between(0.2, 1.1),
        "decay": d.between(0.55, 0.95),
        "gain": d.between(0.25, 0.7),
        **d.mix(first),
    }
    return make("fold", values, {"shift_x": d.between(-0.1, 0.1), "shift_y": d.between(-0.1, 0.1)})


def mirror(d: Draw) -> Instruction:
    """Mirrored in both axes, shifted and turned, again and again: kaleidoscopic folds."""
    values = {
        "rounds": float(d.whole(1, 5)),
        "turn": d.between(-0.25, 0.25),
        "shift_x": d.between(0.1, 0.8),
        "shift_y": d.between(0.0, 0.6),
        "scale": d.octave(0.95, 1.6),
    }
    return make("mirror", values, {"turn": d.loops(0.3)})


def tile(d: Draw) -> Instruction:
    """Cut into cells, staggered like bricks or mirrored."""
    count = d.octave(0.8, 3.0)
    values = {
        "columns": count,
        "rows": count * (d.octave(0.5, 2.0) if d.chance(0.4) else 1.0),
        "stagger": d.of(0.0, 0.0, 0.5, 0.3333333),
        "mirrored": 1.0 if d.chance(0.5) else 0.0,
        "scale": d.between(1.2, 2.6),
        "key": float(d.whole(0, 4000)),
    }
    return make("tile", values)


def polar(d: Draw) -> Instruction:
    """Angle and radius as coordinates: arms, spirals, tunnels."""
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
    return make("polar", values, {"shift_y": d.loops(0.8), "shift_x": d.loops(0.3)})


def kaleidoscope(d: Draw) -> Instruction:
    """Folded into one sector."""
    values = {"sectors": float(d.whole(2, 9)), "turn": d.between(0.0, 1.0), "offset": d.between(0.0, 1.0)}
    return make("kaleidoscope", values, {"offset": d.loops(0.4)})


def swirl(d: Draw) -> Instruction:
    """Turned more, the nearer to a centre."""
    values = {
        "turns": d.between(0.3, 1.6) * d.sign(),
        "narrow": d.octave(0.7, 6.0),
        "centre_x": d.between(-0.6, 0.6),
        "centre_y": d.between(-0.6, 0.6),
    }
    return make("swirl", values, {"turns": d.between(-0.5, 0.5)})


def sine_warp(d: Draw) -> Instruction:
    """Bent by sines of falling size and rising frequency."""
    values = {
        "rounds": float(d.whole(1, 4)),
        "amplitude": d.between(0.08, 0.4),
        "frequency": d.octave(0.2, 1.1),
        "decay": d.between(0.5, 0.85),
        "growth": d.between(1.3, 2.1),
        "phase_x": d.between(0.0, 1.0),
        "phase_y": d.between(0.0, 1.0),
    }
    return make("sine_warp", values, {"phase_x": d.loops(0.7), "phase_y": d.loops(0.7)})


def noise_warp(d: Draw) -> Instruction:
    """Bent by smooth noise."""
    values = {
        "octaves": float(d.whole(1, 4)),
        "amplitude": d.octave(0.15, 0.9),
        "frequency": d.octave(0.6, 2.5),
        "decay": d.between(0.4, 0.65),
        "key": float(d.whole(0, 4000)),
        "shift_x": 0.0,
        "shift_y": 0.0,
    }
    return make("noise_warp", values, {"shift_x": d.between(-0.6, 0.6), "shift_y": d.between(-0.6, 0.6)})


# --- fields ------------------------------------------------------------------------------------------------------


def waves(d: Draw, first: bool) -> Instruction:
    """Stripes."""
    angle, frequency = d.between(0.0, 6.2832), d.octave(0.3, 2.2)
    values = {
        "frequency_x": frequency * float(np.cos(angle)),
        "frequency_y": frequency * float(np.sin(angle)),
        "phase": d.between(0.0, 1.0),
        "gain": d.between(0.5, 1.0),
        **d.mix(first),
    }
    return make("waves", values, {"phase": d.loops(0.7)})


def rings(d: Draw, first: bool) -> Instruction:
    """Circles around a point."""
    values = {
        "frequency": d.octave(0.4, 3.0),
        "centre_x": d.between(-0.6, 0.6),
        "centre_y": d.between(-0.6, 0.6),
        "phase": d.between(0.0, 1.0),
        "gain": d.between(0.5, 1.0),
        **d.mix(first),
    }
    return make("rings", values, {"phase": d.loops(0.7)})


def gradient(d: Draw, first: bool) -> Instruction:
    """A slope, straight or round."""
    values = {
        "slope_x": d.between(-0.7, 0.7),
        "slope_y": d.between(-0.7, 0.7),
        "slope_radius": d.between(-0.8, 0.8) if d.chance(0.5) else 0.0,
        "offset": d.between(-0.4, 0.4),
        **d.mix(first),
    }
    return make("gradient", values)


def noise(d: Draw, first: bool) -> Instruction:
    """Clouds, or ridges."""
    values = {
        "octaves": float(d.whole(2, 5)),
        "frequency": d.octave(0.7, 4.0),
        "decay": d.between(0.4, 0.65),
        "key": float(d.whole(0, 4000)),
        "ridged": 1.0 if d.chance(0.35) else 0.0,
        "gain": d.between(0.7, 1.3),
        **d.mix(first),
    }
    return make("noise", values)


def worley(d: Draw, first: bool) -> Instruction:
    """Cells: the way to the nearest of scattered points, or to the border between two."""
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
    return make("worley", values)


def shapes(d: Draw, first: bool) -> Instruction:
    """The distance to the nearest of a few shapes."""
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
    return make("shapes", values, {"turn": d.loops(0.5)})


def julia(d: Draw, first: bool) -> Instruction:
    """How soon z² + c escapes, and how near it comes to the origin."""
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
    return make("julia", values, {"c_x": d.between(-0.05, 0.05), "c_y": d.between(-0.05, 0.05)})


def curve(d: Draw) -> Instruction:
    """The field folded, squeezed or cut into steps."""
    kind = float(d.of(0, 1, 1, 2, 2, 3, 4, 4))
    values = {
        "kind": kind,
        "slope": d.octave(0.8, 3.0),
        "offset": d.between(-0.5, 0.5),
        "gain": d.between(0.7, 1.2),
        "steps": d.between(0.25, 0.6),
        "cell": d.between(0.3, 1.5) if d.chance(0.4) else 0.0,
    }
    return make("curve", values)


# --- colour ------------------------------------------------------------------------------------------------------


def palette(d: Draw) -> dict[str, float]:
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
    found: dict[str, float] = {}
    for what, numbers in (("base", base), ("swing", swing), ("phase", phase)):
        found |= {f"{what}_{name}": number for name, number in zip(names, numbers)}
    return found


def paint(d: Draw, background: bool) -> Instruction:
    """The field as colour: all over, where it is high, along its zero, or as added light."""
    values = {
        "slope": d.octave(0.15, 0.9) * d.sign(),
        "cell": d.between(0.2, 1.0) if d.chance(0.6) else 0.0,
        "phase": d.between(0.0, 1.0),
        **palette(d),
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
    return make("paint", values, {"phase": d.loops(0.5)})


def shade(d: Draw) -> Instruction:
    """Lighter and darker by the field, darker to the edges."""
    values = {"light": d.between(0.95, 1.2), "slope": d.between(-0.4, 0.4), "vignette": -d.between(0.0, 0.25)}
    return make("shade", values)
