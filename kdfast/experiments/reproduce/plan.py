"""What a table's cells need, where that is or will be, and the commands that make it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.errors import ConfigError
from kdfast.experiments.common.recipe import load_recipe, parse_overrides
from kdfast.experiments.common.results import METRICS, RECIPE
from kdfast.experiments.common.tables import Need, Table
from kdfast.experiments.recipes import is_there

CELLS = "cells"
#: Commands that go on in a folder that they have begun.
_RESUME = ("teach", "synth", "select", "distill", "teach-generator")


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        words: The program and its arguments.
        makes: What is there afterwards.
        cell: The cell whose student it is; empty for teachers and images.
    """

    words: tuple[str, ...]
    makes: Path
    cell: str = ""

    @property
    def done(self) -> bool:
        """Whether that is there already."""
        return (self.makes / METRICS).exists() if self.cell else is_there(self.makes)

    def command(self) -> list[str]:
        """The words, with ``--resume`` where the folder was begun."""
        words = list(self.words)
        if words[:1] == ["kdfast"] and words[1] in _RESUME and self.makes.exists():
            words.append("--resume")
        return [sys.executable if word == "python" and not n else word for n, word in enumerate(words)]


@dataclass(frozen=True)
class Plan:
    """Everything to run, in order, and what was found.

    Attributes:
        steps: Teachers, images, then a student of each cell.
        recipes: By cell, its flat recipe with the places of what it needs.
        found: By path, where it is that was there already.
        missing: What has to be brought first.
    """

    steps: tuple[Step, ...]
    recipes: Mapping[str, Mapping[str, Any]]
    found: Mapping[str, Path]
    missing: tuple[Need, ...]


def make_plan(
    table: Table, cells: Sequence[str], out: Path, *, small: bool, seeds: int, overrides: Mapping[str, Any]
) -> Plan:
    """Find what is there, in the current folder or in ``out``, and plan the rest.

    Args:
        table: The table.
        cells: Which of it.
        out: Where everything is made.
        small: The miniature.
        seeds: Students a cell.
        overrides: Values that go before the recipes'.
    """
    values = {cell: table.resolve(cell, small=small) | dict(overrides) for cell in cells}
    needs: dict[str, Need] = {}
    for each in values.values():
        needs |= {need.path: need for need in table.needs(each, small=small)}
    # A miniature's teachers are nobody's but its own; the paper's may be there already.
    places = {path: Path(path) for path in needs if not small and is_there(path)}
    found = dict(places)
    missing = tuple(need for path, need in needs.items() if need.bring and path not in found)
    steps: dict[Path, Step] = {}
    for path, need in needs.items():
        if path in found or need.bring:
            continue
        places[path] = out / path
        for words in need.words:
            moved = [_moved(word, {**{each: out / each for each in needs}, **places}) for word in words]
            made = Path(_after(moved, "--out") or _after(moved, "--local-dir") or out / path)
            steps[made] = Step(tuple(moved), made)
    located = {cell: {k: _place(v, places) for k, v in each.items()} for cell, each in values.items()}
    students = [
        Step(
            (
                "kdfast",
                "distill",
                "--recipe",
                str(out / CELLS / f"{cell}.yaml"),
                "--out",
                str(out / CELLS / cell),
            )
            + (("--seeds", str(seeds)) if seeds > 1 else ()),
            out / CELLS / cell,
            cell,
        )
        for cell in cells
    ]
    return Plan((*steps.values(), *students), located, found, missing)


def check_missing(missing: Iterable[Need]) -> None:
    """Say what has to be brought, all of it at once.

    Raises:
        ConfigError: Something has.
    """
    if words := [f"{need.path} ({need.bring})" for need in missing]:
        raise ConfigError(f"reproduce: put these in place first: {'; '.join(words)}")


def differences(need: Need, place: Path) -> list[str]:
    """In what a run that was found differs from the command that would have made it."""
    recipe = place / RECIPE
    if not recipe.is_file() or not need.words:
        return []
    asked = parse_overrides([word for word in need.words[-1] if "=" in word and not word.startswith("-")])
    used = load_recipe(recipe)
    return [
        f"{place}: {key} {used[key]}, not {value}"
        for key, value in asked.items()
        if key in used and _plain(used[key]) != _plain(value)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _after(words: Sequence[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words[:-1] else None


def _moved(word: str, places: Mapping[str, Path]) -> str:
    """A word of a command with the place of the path that it is, or that stands after ``=``."""
    key, equals, value = word.partition("=")
    if equals and not word.startswith("-"):
        return f"{key}={_place(value, places)}"
    return str(_place(word, places))


def _place(value: Any, places: Mapping[str, Path]) -> Any:
    if not isinstance(value, str):
        return value
    if value in places:
        return str(places[value])
    # `select --shared` writes two sets below one folder, which no cell names.
    inside = next((p for p in places if p.startswith(f"{value}/") and "/" in value), None)
    return str(places[inside])[: -len(inside) + len(value)] if inside else value


def shell(words: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(words)
