"""Runs side by side: results with their spread in one cell, what each run was told, and tables of two settings.

A table of two settings is drawn where the runs' recipes differ in two keys alone, beside their seeds: the papers'
tables of teacher × student, regime × mixup or data × student are of this kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdfast.report.runs import Run
from kdfast.report.studies import Grid

#: What a reader of results asks first, in this order; what differs between the runs follows.
_FACTS = (
    "method",
    "teacher",
    "student",
    "data",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "schedule",
    "seed",
)
#: Of what made it.
_MADE = ("kdfast", "commit", "torch", "device", "date")
#: Where work happens, and how often it is written down: not what a run is.
WHERE_AND_WHEN = frozenset(
    (
        "device",
        "workers",
        "keep",
        "log_every",
        "tensorboard",
        "eval_every",
        "checkpoint_every",
        "checkpoint_steps",
    )
)
_NOT_SETTINGS = WHERE_AND_WHEN | {"seed", "loader", "on_error"}
_SCORES = ("accuracy", "miou")


def results(runs: Sequence[Run], names: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Head and rows of every number that some run has; of several seeds the mean ± the standard deviation."""
    keys = [
        key
        for key in dict.fromkeys(k for run in runs for k in run.metrics)
        if not key.endswith(("_std", "_mean"))
    ]
    numbers = [key for key in keys if any(_is_number(_mean(run, key)) for run in runs)]
    rows = tuple((name, *(cell(run, key) for key in numbers)) for name, run in zip(names, runs))
    return ("run", *(key.replace("_", " ") for key in numbers)), rows


def facts(runs: Sequence[Run], names: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Head and rows of what each run was told (the usual keys, and those that differ) and what made it.

    Empty where neither is known.
    """
    recipes = [run.recipe for run in runs]
    chosen = [key for key in _FACTS if any(key in recipe for recipe in recipes)]
    chosen += [key for key in differing(recipes) if key not in chosen]
    made = [key for key in _MADE if any(key in run.provenance for run in runs)]
    if not chosen and not made:
        return (), ()
    rows = tuple(
        (
            name,
            *(_said(_seeds(run) if key == "seed" else recipe.get(key)) for key in chosen),
            *(_said(run.provenance.get(key)) for key in made),
        )
        for name, run, recipe in zip(names, runs, recipes)
    )
    return ("run", *(key.replace("_", " ") for key in (*chosen, *made))), rows


def told(run: Run) -> tuple[tuple[str, str], ...]:
    """Key and value of everything that a run was told or took by default, but for what is empty."""
    given = {key: value for key, value in run.recipe.items() if value not in (None, [], ())}
    return tuple((key.replace("_", " "), _said(value)) for key, value in given.items())


def pivots(runs: Sequence[Run]) -> list[Grid]:
    """The score by two settings, where the runs' recipes differ in these two."""
    recipes = [run.recipe for run in runs]
    keys = differing(recipes)
    score = next((key for key in _SCORES if sum(_is_number(_mean(run, key)) for run in runs) > 1), None)
    if score is None or len(keys) != 2 or not all(recipes):
        return []
    down, across = keys
    # Numbers go across: they make the longer axis.
    if all(_is_number(recipe.get(down)) for recipe in recipes) and not all(
        _is_number(recipe.get(across)) for recipe in recipes
    ):
        down, across = across, down
    heads, sides = _values(recipes, across), _values(recipes, down)
    if len(heads) < 2 or len(sides) < 2:
        return []
    found = {(_said(recipe.get(down)), _said(recipe.get(across))): run for run, recipe in zip(runs, recipes)}
    rows = tuple(
        (side, *(cell(found[side, head], score) if (side, head) in found else "–" for head in heads))
        for side in sides
    )
    names = (down.replace("_", " "), across.replace("_", " "))
    title = f"{'Accuracy' if score == 'accuracy' else 'mIoU'} by {names[0]} and {names[1]}"
    return [Grid(title, (f"{names[0]} \\ {names[1]}", *heads), rows)]


def differing(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all recipes, beside the seed and where work happened."""
    keys = [key for key in dict.fromkeys(k for recipe in recipes for k in recipe) if key not in _NOT_SETTINGS]
    return [key for key in keys if len({_said(recipe.get(key)) for recipe in recipes}) > 1]


def cell(run: Run, key: str) -> str:
    """A number of a run as a table shows it: per cent to two decimals, and ± where there are several seeds."""
    value = _mean(run, key)
    if not _is_number(value):
        return "–"
    spread: Any = run.metrics.get(f"{key}_std")
    many = spread is not None and len(run.metrics.get("seeds") or ()) > 1
    if "accuracy" in key or key == "share_kept":
        return f"{100 * value:.2f}" + (f" ± {100 * spread:.2f}" if many else "") + " %"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return text + (f" ± {spread:,.2g}" if many else "")


def _mean(run: Run, key: str) -> Any:
    value = run.metrics.get(f"{key}_mean", run.metrics.get(key))
    return value[0] if isinstance(value, list) and len(value) == 1 and key != "seeds" else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _values(recipes: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    values = [recipe.get(key) for recipe in recipes]
    if all(_is_number(value) for value in values):
        values = sorted(values)  # type: ignore[type-var]
    return list(dict.fromkeys(map(_said, values)))


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_said, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _seeds(run: Run) -> Any:
    return run.metrics.get("seeds", run.metrics.get("seed", run.recipe.get("seed")))
