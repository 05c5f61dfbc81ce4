"""``kdfast reproduce``: make or find what a table's cells need, run them, and set the results beside the paper's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.disk import sweep
from kdfast.errors import ConfigError, KDFastError
from kdfast.experiments.common.results import METRICS, lock_run, out_directory, release_run
from kdfast.experiments.common.tables import Table, load_table
from kdfast.experiments.reproduce.config import ReproduceConfig
from kdfast.experiments.reproduce.page import Row, write_page
from kdfast.experiments.reproduce.plan import CELLS, Plan, Step, check_missing, differences, make_plan, shell
from kdfast.report.runs import read_results
from kdfast.training import files
from kdfast.yaml_documents import dump_yaml

#: What runs a command of kdfast, given its words after ``kdfast``; returns the exit status.
Execute = Callable[[Sequence[str]], int]
RESULTS = "reproduce.json"
_INTERRUPTED = 130


@dataclass(frozen=True)
class _Work:
    config: ReproduceConfig
    table: Table
    cells: tuple[str, ...]
    out: Path
    plan: Plan

    @property
    def small(self) -> bool:
        return self.config.scale == "small"


def run(config: ReproduceConfig, execute: Execute) -> dict[str, Any]:
    """Run a table's cells, or what is left of them.

    Args:
        config: Which cells, and how.
        execute: What runs a command of kdfast in this process.

    Returns:
        ``cells`` that are finished, ``report``, the page, and ``results``: by cell ``paper``, ``ours``, ``difference``
        and ``seeds``. Of a dry run ``commands`` and ``missing``.

    Raises:
        ConfigError: There is no such table, cell or miniature, something has to be brought first, or ``out`` holds
            these cells with other values.
        KDFastError: A command failed; what was finished stays, and the same line goes on from there.
        KeyboardInterrupt: On Ctrl-C, likewise.
    """
    table = load_table(config.table)
    small = config.scale == "small"
    if small and not table.small_cells:
        table.resolve(table.cells[0], small=True)  # raises: there is none
    cells = tuple(map(table.check, config.cells)) or (table.small_cells if small else table.cells)
    out = out_directory(config.out)
    plan = make_plan(table, cells, out, small=small, seeds=config.seeds, overrides=config.overrides)
    left = [step for step in plan.steps if not step.done]
    if config.dry_run:
        missing = [f"{need.path}: {need.bring}" for need in plan.missing]
        return {"commands": [shell(step.command()) for step in left], "missing": missing}
    check_missing(plan.missing)
    with files.reporting_disk(out):
        (out / CELLS).mkdir(parents=True, exist_ok=True)
    lock_run(out)
    sweep(out / CELLS)
    work = _Work(config, table, cells, out, plan)
    try:
        for cell in cells:
            _write_recipe(work, cell)
        _report(work)
        for number, step in enumerate(left, 1):
            _say(work, f"{number}/{len(left)}  {shell(step.command())}")
            _run(step, execute)
            if step.cell:
                _report(work)
        return _report(work)
    finally:
        release_run(out)


def _run(step: Step, execute: Execute) -> None:
    words = step.command()
    try:
        status = execute(words[1:]) if words[0] == "kdfast" else subprocess.run(words, check=False).returncode
    except FileNotFoundError as error:
        raise ConfigError(
            f"reproduce: {words[0]} is not installed; it is wanted for: {shell(words)}"
        ) from error
    if status == _INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        raise KDFastError(
            f"reproduce: {shell(words)} ended with status {status}; what was finished stays, and the same "
            "`kdfast reproduce` goes on from there"
        )


def _write_recipe(work: _Work, cell: str) -> None:
    """The cell's flat recipe, as it is run; one of other values is not gone on with."""
    path = work.out / CELLS / f"{cell}.yaml"
    text = dump_yaml(dict(work.plan.recipes[cell]))
    if path.exists() and path.read_text() != text and (work.out / CELLS / cell).exists():
        raise ConfigError(
            f"--out: {work.out} holds cell {cell} with other values (see {path}); choose another directory"
        )
    files.write_file(path, text)


def _report(work: _Work) -> dict[str, Any]:
    """Write the results of the cells that are finished, and the page."""
    rows = [_row(work, cell) for cell in work.cells]
    results = {row.cell: row.as_dict() for row in rows if row.ours}
    teachers = {need: _accuracy(place, work.table.metric) for need, place in _teachers(work).items()}
    page = write_page(
        work.table,
        rows,
        work.out,
        small=work.small,
        seeds=work.config.seeds,
        differs=_differs(work),
        teachers=teachers,
    )
    files.write_json(
        work.out / RESULTS,
        {"table": work.table.name, "scale": work.config.scale, "metric": work.table.metric, "cells": results},
    )
    return {"cells": f"{len(results)} of {len(rows)}", "report": str(page), "results": results}


def _row(work: _Work, cell: str) -> Row:
    place = work.out / CELLS / cell / METRICS
    metrics = read_results(place)
    found = {}
    for name in ("accuracy", "top5_accuracy", "miou"):
        value = metrics.get(f"{name}_mean", metrics.get(name))
        if isinstance(value, float):
            scale = 1 if name == "miou" else 100
            width = metrics.get(f"{name}_std", 0.0)
            found[name] = (scale * value, scale * width if isinstance(width, float) else 0.0)
    seconds = metrics.get("seconds_mean", metrics.get("seconds"))
    seeds = metrics.get("seeds", [metrics["seed"]] if "seed" in metrics else [])
    recipe = work.plan.recipes[cell]
    teacher = Path(str(recipe.get("teacher"))).name
    trained = f"{recipe.get('student')} from {teacher}" if work.small else ""
    return Row(cell, work.table.paper(cell), found, tuple(seeds), seconds, not work.small, trained)


def _teachers(work: _Work) -> dict[str, Path]:
    places = {str(recipe.get("teacher")) for recipe in work.plan.recipes.values()}
    return {place: Path(place) for place in sorted(places) if Path(place, METRICS).exists()}


def _accuracy(place: Path, metric: str) -> float | None:
    value = read_results(place / METRICS).get(metric)
    return float(value) if isinstance(value, (int, float)) else None


def _differs(work: _Work) -> list[str]:
    """What is not as the paper has it, as far as it is known."""
    differs: list[str] = []
    if work.small:
        differs.append(
            f"A miniature: {work.table.small_note or 'a small set'}. Its numbers say nothing about the paper's."
        )
    differs += [f"{key}: {value}, set on the command line" for key, value in work.config.overrides.items()]
    for recipe in work.plan.recipes.values():
        for need in work.table.needs(recipe, small=work.small):
            if need.path in work.plan.found:
                differs += differences(need, work.plan.found[need.path])
    return list(dict.fromkeys(differs))


def _say(work: _Work, line: str) -> None:
    if work.config.progress:
        print(line, file=sys.stderr, flush=True)


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the command prints: the cells on a line each, and where the page is."""
    lines = {
        cell: ", ".join(
            f"{name} {ours:.2f}" + (f" (the paper: {row['paper'][name]:.2f})" if name in row["paper"] else "")
            for name, ours in row["ours"].items()
        )
        for cell, row in result.get("results", {}).items()
    }
    return lines | {key: value for key, value in result.items() if key != "results"}
