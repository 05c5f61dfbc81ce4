"""What a run left behind: ``metrics.json`` (results), ``metrics.jsonl`` (the log) and ``samples*.png``."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdfast.documents import read_json, read_json_lines, read_text
from kdfast.errors import ConfigError, DataError
from kdfast.yaml_documents import MAX_RECIPE, parse_yaml

METRICS = "metrics.json"
LOG = "metrics.jsonl"
RECIPE = "recipe.yaml"
PROVENANCE = "provenance.json"


def _number(value: Any) -> float:
    """A value of a log; one that is no number is a gap in the curve."""
    return float(value) if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max else math.nan


@dataclass(frozen=True)
class Run:
    """One run's record.

    Attributes:
        path: Its directory.
        name: What to call it: the directory's name.
        metrics: ``metrics.json``, empty if the run is not finished.
        log: The lines of ``metrics.jsonl``, in order.
        children: Runs in its subdirectories (a demo has five).
        told: ``recipe.yaml``, key by key; empty if there is none, or nothing to read it with.
        made: ``provenance.json``: releases, commit, device, date; empty if there is none.
    """

    path: Path
    name: str
    metrics: dict[str, Any]
    log: tuple[dict[str, Any], ...]
    children: tuple[Run, ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Where it is, how far it came and what it reached."""
        steps = max((int(step) for line in self.log if (step := _number(line.get("step"))) >= 0), default=0)
        parts = [f"{steps:,} steps" if steps else "", "" if self.metrics else "not finished"]
        accuracy = _number(self.metrics.get("accuracy", self.metrics.get("accuracy_mean")))
        parts.append("" if math.isnan(accuracy) else f"accuracy {100 * accuracy:.1f} %")
        parts.append(f"runs {', '.join(child.name for child in self.children)}" if self.children else "")
        return f"Run({str(self.path)!r}: {', '.join(part for part in parts if part) or 'finished'})"

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What it was told, or its seeds' runs were."""
        return self.told or next((child.told for child in self.children if child.told), {})

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What made it, or the first of its seeds' runs."""
        return self.made or next((child.made for child in self.children if child.made), {})

    def series(self, kind: str, key: str, *, against: str = "step") -> tuple[list[float], list[float]]:
        """One curve of the log.

        Args:
            kind: ``"train"`` or ``"eval"``.
            key: The value, e.g. ``"loss"``.
            against: What to plot it over.

        Returns:
            x and y, equally long; empty if the log has no such value.
        """
        points = [
            (_number(e[against]), _number(e[key]))
            for e in self.log
            if e.get("kind") == kind and key in e and against in e
        ]
        return [x for x, _ in points], [y for _, y in points]

    @property
    def pictures(self) -> list[Path]:
        """Sample grids in its directory."""
        return sorted(self.path.glob("samples*.png"))


def read_run(path: str | Path) -> Run:
    """Read a run's directory, and the runs directly below it.

    Raises:
        DataError: It does not exist, holds no metrics, or a file is damaged; the message names the file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: does not exist, or is no directory")
    run = _read(folder)
    if not (run.metrics or run.log or run.children):
        raise DataError(f"{folder}: holds neither {METRICS} nor {LOG}, so there is nothing to report on")
    return run


def _read(folder: Path) -> Run:
    children = [_read(child) for child in sorted(folder.iterdir()) if child.is_dir() and _has_metrics(child)]
    metrics, told = read_results(folder / METRICS), _recipe(folder / RECIPE)
    made = read_results(folder / PROVENANCE)
    return Run(folder, _name(folder), metrics, _log(folder / LOG), tuple(children), told, made)


def _name(folder: Path) -> str:
    """The directory's name on one line, in letters that a page can hold."""
    return " ".join(folder.resolve().name.encode("utf-8", "backslashreplace").decode().split())


def _has_metrics(folder: Path) -> bool:
    return not folder.name.startswith(".") and ((folder / METRICS).exists() or (folder / LOG).exists())


def read_results(path: Path) -> dict[str, Any]:
    """What a ``metrics.json``, or a record of what made it, holds; nothing where there is none.

    Raises:
        DataError: It cannot be read, or holds no object.
    """
    try:
        document = read_json(path, error=DataError)
    except FileNotFoundError:
        return {}
    if not isinstance(document, dict):
        raise DataError(f"{path}: holds a JSON {type(document).__name__}, expected an object")
    return document


def _log(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        return tuple(read_json_lines(path, error=DataError))
    except FileNotFoundError:
        return ()


def _recipe(path: Path) -> dict[str, Any]:
    if importlib.util.find_spec("yaml") is None:  # a report of numbers needs no YAML
        return {}
    try:
        text = read_text(
            path, error=DataError, limit=4 * MAX_RECIPE
        )  # its letters are counted again, as letters
        document = parse_yaml(text, what=str(path))
    except FileNotFoundError:
        return {}
    except ConfigError as error:
        raise DataError(str(error)) from error
    return document if isinstance(document, dict) else {}
