"""Figures of runs that invert a teacher: what is in the buffer, how it came there, where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kdfast.report import plots
from kdfast.report.runs import Run

#: Lists in ``metrics.json`` that are drawn and make no table.
DRAWN = ("category_counts", "difficulty_counts")


class Drawing(NamedTuple):
    """A figure with its words."""

    title: str
    caption: str
    svg: str


def buffer_figures(runs: Mapping[str, Run]) -> list[Drawing]:
    """How classes and difficulty are spread over each run's buffer (SSD-KD, Fig. 2)."""
    made = []
    if categories := _shares(runs, "category_counts"):
        svg = plots.columns(
            categories, xlabel="class that the teacher predicts", ylabel="share of the buffer", percent=True
        )
        made.append(Drawing("Categories", "A level row of columns is a balanced buffer.", svg))
    if difficulty := _shares(runs, "difficulty_counts"):
        bins = len(next(iter(difficulty.values())))
        svg = plots.columns(
            difficulty,
            xlabel="the teacher's probability of its prediction",
            ylabel="share of the buffer",
            labels=[f"{(number + 0.5) / bins:.2f}" for number in range(bins)],
            percent=True,
        )
        made.append(Drawing("Difficulty", "Hard images are on the left, easy ones on the right.", svg))
    return made


def trace_figures(run: Run) -> dict[str, list[Drawing]]:
    """What inversion and distillation logged over the steps, by section."""
    sections: dict[str, list[Drawing]] = {}
    for section, title, keys, log, caption in _TRACES:
        series = {words: run.series("train", key) for key, words in keys.items()}
        series = {words: curve for words, curve in series.items() if any(curve[1])}
        if series:
            positive = all(value > 0 for _, values in series.values() for value in values)
            svg = plots.curves(series, xlabel="step", ylabel="", log=log and positive)
            sections.setdefault(section, []).append(Drawing(title, caption, svg))
    return sections


_TRACES: tuple[tuple[str, str, dict[str, str], bool, str], ...] = (
    (
        "Inversion",
        "Modulation φ",
        {"phi": "mean φ"},
        False,
        "What the cross-entropy is multiplied by, on average (Eq. 3).",
    ),
    (
        "Inversion",
        "Terms of the loss",
        {"bn": "batch-norm statistics", "oh": "φ·cross-entropy", "adv": "disagreement"},
        True,
        "Each before its weight, averaged over a round's steps.",
    ),
    (
        "Distillation",
        "Priority",
        {"priority": "δ = w·KL", "kl": "KL", "importance": "w"},
        True,
        "Means over the rows that were drawn (Eqs. 4 and 5).",
    ),
    (
        "Distillation",
        "Agreement",
        {"agreement": "same class"},
        False,
        "Share of the drawn rows where student and teacher predict the same class.",
    ),
)


def phase_figure(runs: Mapping[str, Run]) -> list[Drawing]:
    """Seconds of inversion and distillation."""
    phases: dict[str, float] = {}
    for name, run in runs.items():
        for phase, seconds in run.metrics.get("seconds_by_phase", {}).items():
            phases[phase if len(runs) == 1 else f"{name}: {phase}"] = float(seconds)
    if not phases:
        return []
    return [Drawing("Seconds by phase", "", plots.bars(phases, xlabel="seconds", unit="s"))]


def class_accuracy_figure(runs: Mapping[str, Run]) -> list[Drawing]:
    """Accuracy of each class on held-out images (SSD-KD, Fig. 1)."""
    found = {
        name: run.metrics["class_accuracy"] for name, run in runs.items() if "class_accuracy" in run.metrics
    }
    if not found:
        return []
    classes = list(next(iter(found.values())))
    found = {name: values for name, values in found.items() if list(values) == classes}
    svg = plots.columns(
        {name: [float(values[each]) for each in classes] for name, values in found.items()},
        xlabel="class",
        ylabel="top-1 accuracy",
        labels=classes,
        percent=True,
        wide=True,
    )
    return [Drawing("Accuracy by class", "", svg)]


def scale_figures(runs: Mapping[str, Run]) -> list[Drawing]:
    """Accuracy and time over the buffer's size (SSD-KD, Fig. 4), a line for each pair of networks.

    A pair whose runs do not differ in size alone, as far as sizes tell, has no line.
    """
    pairs: dict[str, list[tuple[int, Run]]] = {}
    for run in runs.values():
        if run.metrics.get("capacity"):
            pair = str(run.metrics.get("networks", "runs"))
            pairs.setdefault(pair, []).append((int(run.metrics["capacity"]), run))
    pairs = {
        pair: sorted(found, key=lambda entry: entry[0])
        for pair, found in pairs.items()
        if len(found) > 1 and len({size for size, _ in found}) == len(found)
    }
    made = []
    for key, title, ylabel in (
        ("accuracy", "Accuracy by data scale", "top-1 accuracy"),
        ("seconds", "Time by data scale", "seconds"),
    ):
        lines = {
            pair: ([size for size, _ in found], [float(run.metrics[key]) for _, run in found])
            for pair, found in pairs.items()
            if all(key in run.metrics for _, run in found)
        }
        if lines:
            svg = plots.curves(
                lines,
                xlabel="images in the buffer",
                ylabel=ylabel,
                percent=key == "accuracy",
                marked=True,
            )
            made.append(Drawing(title, "", svg))
    return made


def _shares(runs: Mapping[str, Run], key: str) -> dict[str, Sequence[float]]:
    shares: dict[str, Sequence[float]] = {}
    for name, run in runs.items():
        counts = run.metrics.get(key)
        if counts and sum(counts):
            shares[name] = [count / sum(counts) for count in counts]
    lengths = {len(values) for values in shares.values()}
    return shares if len(lengths) == 1 else {}
