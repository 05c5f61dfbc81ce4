"""What several runs say together: a value over a setting that differs between them, and tables of two settings.

DM-KD's figures and tables are of this kind: accuracy over guidance s and steps T (Table 6), over the number of images
(Fig. 5), over the temperature (Fig. 6); a teacher's accuracy on the set and the variance of its probabilities
(Tables 11 and 12); a scorer's mean (Table 5). Each is drawn wherever the runs given have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdfast.report import plots
from kdfast.report.runs import Run

#: Settings that are numbers to plot over, and how to write them.
_OVER = {
    "guidance_scale": "guidance scale s",
    "steps": "denoising steps T",
    "images": "synthetic images",
    "temperature": "temperature τ",
}
_LOG = ("images", "temperature")
_ROWS, _COLUMNS = "guidance_scale", "steps"


@dataclass(frozen=True)
class Measure:
    """A number that runs have: its key in ``metrics.json``, what to call it, and how it is shown."""

    key: str
    name: str
    title: str
    percent: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Point:
    """One run, or the mean of several seeds' runs."""

    settings: Mapping[str, Any]
    value: float
    error: float = 0.0


@dataclass(frozen=True)
class Plot:
    """A title and an SVG."""

    title: str
    svg: str


@dataclass(frozen=True)
class Grid:
    """A value by two settings: rows of text, the first of each being the row's name."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


STUDENT = Measure("accuracy", "student's top-1 accuracy", "Student accuracy", percent=True)
TEACHER = Measure(
    "accuracy", "network's top-1 accuracy on the set", "Accuracy on the synthetic set", percent=True
)
VARIANCE = Measure(
    "probability_variance", "variance of probabilities, in 1e-4", "Variance of class probabilities", scale=1e4
)
SCORE = Measure("score", "mean score", "Score of the images")


def studies(runs: Sequence[Run]) -> tuple[list[Plot], list[Grid]]:
    """Every plot and table that these runs have together."""
    found: tuple[list[Plot], list[Grid]] = ([], [])
    for measure, chosen in _measures(runs):
        points = [point for run in chosen if (point := _point(run, measure))]
        found[0].extend(plot for over in _OVER if (plot := _plot(points, measure, over)))
        found[1].extend(_grids(points, measure))
    return found


def _measures(runs: Sequence[Run]) -> list[tuple[Measure, list[Run]]]:
    """What to draw of which runs: students have a temperature, evaluations on a set a variance, sets a score."""
    judged = [run for run in runs if VARIANCE.key in run.metrics]
    students = [run for run in runs if run not in judged and "temperature" in _settings(run)]
    scored = [run for run in runs if SCORE.key in run.metrics]
    return [(STUDENT, students), (TEACHER, judged), (VARIANCE, judged), (SCORE, scored)]


def _settings(run: Run) -> Mapping[str, Any]:
    """Of the run, or of its seeds' runs, which share them."""
    for each in (run, *run.children):
        settings = each.metrics.get("settings")
        if isinstance(settings, Mapping):
            known = {key: value for key, value in settings.items() if key != "seed"}
            if "score" in each.metrics and isinstance(each.metrics.get("images"), int):
                known.setdefault("images", each.metrics["images"])
            return known
    return {}


def _point(run: Run, measure: Measure) -> Point | None:
    value = run.metrics.get(f"{measure.key}_mean", run.metrics.get(measure.key))
    settings = _settings(run)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not settings:
        return None
    error = run.metrics.get(f"{measure.key}_std", 0.0)
    return Point(settings, measure.scale * value, measure.scale * float(error))


def _plot(points: Sequence[Point], measure: Measure, over: str) -> Plot | None:
    """A line for each choice of the other settings that has at least two points."""
    groups: dict[tuple[tuple[str, str], ...], list[Point]] = {}
    for point in points:
        if isinstance(point.settings.get(over), (int, float)):
            rest = tuple(sorted((k, str(v)) for k, v in point.settings.items() if k != over))
            groups.setdefault(rest, []).append(point)
    lines = {
        rest: sorted(group, key=lambda point: float(point.settings[over]))
        for rest, group in groups.items()
        if len({point.settings[over] for point in group}) > 1
    }
    if not lines:
        return None
    names = _names(list(lines))
    series = {
        name: ([float(p.settings[over]) for p in line], [p.value for p in line])
        for name, line in zip(names, lines.values())
    }
    svg = plots.curves(
        series,
        xlabel=_OVER[over],
        ylabel=measure.name,
        percent=measure.percent,
        errors={name: [p.error for p in line] for name, line in zip(names, lines.values())},
        marked=True,
        log_x=over in _LOG,
    )
    return Plot(f"{measure.title} over {_OVER[over]}", svg)


def _names(groups: Sequence[tuple[tuple[str, str], ...]]) -> list[str]:
    """Each line by those of its settings that differ between the lines."""
    if len(groups) == 1:
        return ["all"]
    values: dict[str, set[str | None]] = {}
    for group in groups:
        for key in {key for other in groups for key, _ in other}:
            values.setdefault(key, set()).add(dict(group).get(key))
    differing = sorted(key for key, seen in values.items() if len(seen) > 1)
    return [
        ", ".join(f"{key.replace('_', ' ')} {dict(group).get(key, '–')}" for key in differing)
        for group in groups
    ]


def _grids(points: Sequence[Point], measure: Measure) -> list[Grid]:
    """Guidance down, steps across: a table for each choice of the other settings with which both vary."""
    groups: dict[tuple[tuple[str, str], ...], list[Point]] = {}
    for point in points:
        if all(isinstance(point.settings.get(key), (int, float)) for key in (_ROWS, _COLUMNS)):
            rest = tuple(sorted((k, str(v)) for k, v in point.settings.items() if k not in (_ROWS, _COLUMNS)))
            groups.setdefault(rest, []).append(point)
    varied = {
        rest: group
        for rest, group in groups.items()
        if all(len({point.settings[key] for point in group}) > 1 for key in (_ROWS, _COLUMNS))
    }
    titles = [f"{measure.title} by guidance s and steps T"] * len(varied)
    if len(varied) > 1:
        titles = [f"{title}, {name}" for title, name in zip(titles, _names(list(varied)))]
    return [_grid(title, group, measure) for title, group in zip(titles, varied.values())]


def _grid(title: str, points: Sequence[Point], measure: Measure) -> Grid:
    scales = sorted({point.settings[_ROWS] for point in points})
    steps = sorted({point.settings[_COLUMNS] for point in points})
    cells = {(point.settings[_ROWS], point.settings[_COLUMNS]): point for point in points}
    return Grid(
        title,
        ("s", *(f"T = {step:g}" for step in steps)),
        tuple(
            (f"{scale:g}", *(_cell(cells.get((scale, step)), measure) for step in steps)) for scale in scales
        ),
    )


def _cell(point: Point | None, measure: Measure) -> str:
    if point is None:
        return "–"
    factor, digits = (100, 2) if measure.percent else (1, 3)
    spread = f" ± {factor * point.error:.{digits}f}" if point.error else ""
    return f"{factor * point.value:.{digits}f}{spread}"
