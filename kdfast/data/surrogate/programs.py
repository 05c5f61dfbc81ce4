"""Shader programs as values: frozen, comparable, saved as JSON, and laid out as a table for a device."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.disk import write_atomic
from kdfast.documents import read_json, shown
from kdfast.errors import DataError
from kdfast.reference.procedural.shaders import MAX_ROUNDS, SLOTS, Op

FORMAT = "kdfast-shaders"
VERSION = 1
#: Instructions that a program may have.
MAX_INSTRUCTIONS = 64
#: Bound of every number and rate in a program.
MAX_NUMBER = 4096.0

_MIX = ("keep", "add", "times")
#: Every operation and its numbers, in order. Angles and phases are in turns: 1 is a full one.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "view": ("turn", "zoom_x", "zoom_y", "shift_x", "shift_y"),
    "affine": ("turn", "scale_x", "scale_y", "shift_x", "shift_y"),
    "fold": ("rounds", "shift_x", "shift_y", "decay", "gain", *_MIX),
    "mirror": ("rounds", "turn", "shift_x", "shift_y", "scale"),
    "tile": ("columns", "rows", "stagger", "mirrored", "scale", "key"),
    "polar": ("arms", "spiral", "octaves", "linear", "tunnel", "shift_x", "shift_y"),
    "kaleidoscope": ("sectors", "turn", "offset"),
    "swirl": ("turns", "narrow", "centre_x", "centre_y"),
    "sine_warp": ("rounds", "amplitude", "frequency", "decay", "growth", "phase_x", "phase_y"),
    "noise_warp": ("octaves", "amplitude", "frequency", "decay", "key", "shift_x", "shift_y"),
    "waves": ("frequency_x", "frequency_y", "phase", "gain", *_MIX),
    "rings": ("frequency", "centre_x", "centre_y", "phase", "gain", *_MIX),
    "gradient": ("slope_x", "slope_y", "slope_radius", "offset", *_MIX),
    "noise": ("octaves", "frequency", "decay", "key", "ridged", "gain", *_MIX),
    "worley": ("frequency", "key", "jitter", "nearest", "border", "offset", *_MIX),
    "shapes": ("kind", "count", "size", "turn", "shift_x", "shift_y", "shrink", "hollow", "gain", *_MIX),
    "julia": ("rounds", "c_x", "c_y", "count", "trap", *_MIX),
    "curve": ("kind", "slope", "offset", "gain", "steps", "cell"),
    "paint": (
        *("slope", "cell", "phase"),
        *("base_r", "base_g", "base_b", "swing_r", "swing_g", "swing_b", "phase_r", "phase_g", "phase_b"),
        *("cover", "cover_slope", "cover_distance", "opacity"),
    ),
    "shade": ("light", "slope", "vignette"),
}
#: Numbers that count rounds, that something is divided by, or that are raised to a power, and what they may be.
_RANGES = {
    "rounds": (0, MAX_ROUNDS),
    "octaves": (0, 8),
    "count": (0, MAX_ROUNDS),
    "sectors": (1, 64),
    "decay": (-4, 4),
    "growth": (-4, 4),
    "shrink": (0.25, 4),
    "narrow": (0, MAX_NUMBER),
}
#: The same by operation and name.
RANGED = {
    (op, name): bounds
    for op, names in OPERATIONS.items()
    for name, bounds in _RANGES.items()
    if name in names and (op, name) not in {("julia", "count"), ("polar", "octaves")}
}


def _rounded(numbers: Sequence[float]) -> tuple[float, ...]:
    """As float32 has them, so that a program equals what a device computes with, and survives JSON."""
    return tuple(float(np.float32(number)) for number in numbers)


@dataclass(frozen=True)
class Instruction:
    """One step of a program: an operation and its numbers, each moving linearly with time.

    Attributes:
        op: A key of :data:`OPERATIONS`.
        values: Its numbers at time 0, in the order listed there; rounded to float32.
        rates: What a unit of time adds to each; empty for none.

    Raises:
        ValueError: An operation that does not exist, a wrong count of numbers, or one that is out of range.
    """

    op: str
    values: tuple[float, ...]
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.op not in OPERATIONS:
            raise ValueError(f"op: got {self.op!r}; accepted: {', '.join(OPERATIONS)}")
        names = OPERATIONS[self.op]
        rates = self.rates or (0.0,) * len(names)
        for what, numbers in (("values", self.values), ("rates", rates)):
            if len(numbers) != len(names):
                raise ValueError(
                    f"{what}: {self.op} got {len(numbers)} numbers; it takes {len(names)}: {', '.join(names)}"
                )
            for name, number in zip(names, numbers, strict=True):
                if not (math.isfinite(number) and abs(number) <= MAX_NUMBER):
                    raise ValueError(
                        f"{what}: {self.op} got {name}={number}; accepted: −{MAX_NUMBER:g} to {MAX_NUMBER:g}"
                    )
        for name, value, rate in zip(names, self.values, rates, strict=True):
            if (bounds := RANGED.get((self.op, name))) is None:
                continue
            if not bounds[0] <= value <= bounds[1]:
                raise ValueError(
                    f"values: {self.op} got {name}={value}; accepted: {bounds[0]} to {bounds[1]}"
                )
            if rate:
                raise ValueError(f"rates: {self.op} got {name}={rate}; {name} cannot move with time")
        object.__setattr__(self, "values", _rounded(self.values))
        object.__setattr__(self, "rates", _rounded(rates))

    def __str__(self) -> str:
        pairs = zip(OPERATIONS[self.op], self.values, self.rates, strict=True)
        return f"{self.op}({', '.join(f'{n}={v:.4g}' + (f'{r:+.3g}t' if r else '') for n, v, r in pairs)})"


@dataclass(frozen=True)
class Program:
    """A picture at every time: instructions that carry positions, fields and colours from one to the next.

    ``view`` starts a layer at the pixel's own place; ``paint`` lays it over what was painted before.

    Raises:
        ValueError: No instruction, or more than :data:`MAX_INSTRUCTIONS`.
    """

    instructions: tuple[Instruction, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.instructions) <= MAX_INSTRUCTIONS:
            raise ValueError(f"instructions: got {len(self.instructions)}; accepted: 1 to {MAX_INSTRUCTIONS}")

    @property
    def structure(self) -> tuple[str, ...]:
        """The operations without their numbers."""
        return tuple(instruction.op for instruction in self.instructions)

    @property
    def layers(self) -> tuple[tuple[Instruction, ...], ...]:
        """The instructions, cut in front of every ``view``."""
        cuts = [i for i, instruction in enumerate(self.instructions) if instruction.op == "view" and i > 0]
        return tuple(
            self.instructions[a:b] for a, b in zip([0, *cuts], [*cuts, len(self.instructions)], strict=True)
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it: operations with their numbers by name, rates only where there are any."""
        return {"instructions": [_instruction_dict(instruction) for instruction in self.instructions]}

    @staticmethod
    def from_dict(document: Any) -> Program:
        """The program that :meth:`as_dict` wrote.

        Raises:
            ValueError: It is not one; the message says what is wrong with it.
        """
        if not isinstance(document, dict) or not isinstance(document.get("instructions"), list):
            raise ValueError("a program is an object with a list of instructions")
        return Program(tuple(_instruction_of(entry) for entry in document["instructions"]))


def _instruction_dict(instruction: Instruction) -> dict[str, Any]:
    names = OPERATIONS[instruction.op]
    entry: dict[str, Any] = {
        "op": instruction.op,
        "values": dict(zip(names, instruction.values, strict=True)),
    }
    if moving := {n: r for n, r in zip(names, instruction.rates, strict=True) if r}:
        entry["rates"] = moving
    return entry


def _instruction_of(entry: Any) -> Instruction:
    if not isinstance(entry, dict) or not isinstance(entry.get("values"), dict):
        raise ValueError(f"an instruction is an object with op and values; got {shown(entry)}")
    if not isinstance(op := entry.get("op"), str) or op not in OPERATIONS:
        raise ValueError(f"op: got {shown(op)}; accepted: {', '.join(OPERATIONS)}")
    names, values, rates = OPERATIONS[op], entry["values"], entry.get("rates") or {}
    if set(values) != set(names):
        raise ValueError(f"values: {op} got {shown(', '.join(values))}; it takes {', '.join(names)}")
    if not isinstance(rates, dict) or not set(rates) <= set(names):
        raise ValueError(f"rates: {op} got {shown(rates)}; it takes {', '.join(names)}")
    numbers = [*values.values(), *rates.values()]
    if wrong := [n for n in numbers if isinstance(n, bool) or not isinstance(n, (int, float))]:
        raise ValueError(f"values: {op} got {shown(wrong[0])}; numbers are needed")
    if any(abs(n) > 1e9 for n in numbers):
        raise ValueError(
            f"values: {op} got a number beyond any bound; accepted: −{MAX_NUMBER:g} to {MAX_NUMBER:g}"
        )
    return Instruction(
        op, tuple(values[name] for name in names), tuple(rates.get(name, 0.0) for name in names)
    )


@dataclass(frozen=True)
class ProgramTable:
    """Programs as a device reads them.

    Attributes:
        codes: int32 ``[P, L]``: operations, 0 behind a program's end.
        values: float32 ``[P, L, 16]``: their numbers at time 0.
        rates: float32 ``[P, L, 16]``: what a unit of time adds.
    """

    codes: torch.Tensor
    values: torch.Tensor
    rates: torch.Tensor


def table(programs: Sequence[Program], device: torch.device | str = "cpu") -> ProgramTable:
    """Lay programs out for a device.

    Raises:
        ValueError: There is no program.
    """
    if not programs:
        raise ValueError("programs: got none; at least one is needed")
    longest = max(len(program.instructions) for program in programs)
    codes = np.zeros((len(programs), longest), np.int32)
    numbers = np.zeros((2, len(programs), longest, SLOTS), np.float32)
    for i, program in enumerate(programs):
        for k, instruction in enumerate(program.instructions):
            codes[i, k] = Op[instruction.op.upper()]
            numbers[0, i, k, : len(instruction.values)] = instruction.values
            numbers[1, i, k, : len(instruction.rates)] = instruction.rates
    moved = torch.from_numpy(numbers).to(device)
    return ProgramTable(torch.from_numpy(codes).to(device), moved[0], moved[1])


def save_programs(programs: Sequence[Program], path: str | os.PathLike[str]) -> Path:
    """Write programs as JSON; :func:`load_programs` gives equal ones back."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "programs": [program.as_dict()["instructions"] for program in programs],
    }
    write_atomic(Path(path), (json.dumps(document, separators=(",", ":")) + "\n").encode())
    return Path(path)


def load_programs(path: str | os.PathLike[str]) -> list[Program]:
    """Read programs that :func:`save_programs` wrote, or that someone wrote by hand.

    Raises:
        DataError: The file cannot be read, or holds something else; the message says which program is wrong, and why.
    """
    try:
        document = read_json(path, error=DataError)
    except FileNotFoundError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path}: is not a file of shader programs")
    if document.get("version") != VERSION:
        raise DataError(
            f"{path}: has version {shown(document.get('version'))}; this kdfast reads version {VERSION}"
        )
    found = []
    entries = document.get("programs")
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        try:
            found.append(Program.from_dict({"instructions": entry}))
        except ValueError as error:
            raise DataError(f"{path}: program {number}: {error}") from error
    if not found:
        raise DataError(f"{path}: holds no programs")
    return found
