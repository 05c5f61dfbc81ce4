"""Figures of runs that match features: the loss's parts, the noise adapter's γ, accuracy over evaluations."""

from __future__ import annotations

from collections.abc import Mapping

from kdfast.report import plots
from kdfast.report.inversion import Drawing
from kdfast.report.runs import Run

_PARTS = {"kd": "distance", "diffusion": "diffusion", "autoencoder": "autoencoder"}


def part_figures(run: Run) -> list[Drawing]:
    """What the method's loss was made of over the steps, and γ of each pair."""
    made = []
    for name, series in _by_pair(run).items():
        if len(series) > 1:
            positive = all(value > 0 for _, values in series.values() for value in values)
            svg = plots.curves(series, xlabel="step", ylabel="", log=positive)
            title = f"Loss parts: {name}" if name else "Loss parts"
            made.append(Drawing(title, "Each before its weight.", svg))
    gamma = _series(run, "gamma_")
    if gamma:
        svg = plots.curves(gamma, xlabel="step", ylabel="mean γ")
        made.append(
            Drawing("Noise adapter", "Share of the student's own feature in the start of denoising.", svg)
        )
    return made


def evaluation_figure(runs: Mapping[str, Run]) -> list[Drawing]:
    """Accuracy over network evaluations (DiffKD, Fig. 4), for runs that differ in them."""
    found = sorted(
        (int(run.metrics["nfe"]), value)
        for run in runs.values()
        if "nfe" in run.metrics
        and isinstance(value := run.metrics.get("accuracy_mean", run.metrics.get("accuracy")), float)
    )
    if len({count for count, _ in found}) < 2:
        return []
    curve = ([float(count) for count, _ in found], [value for _, value in found])
    svg = plots.curves(
        {"student": curve}, xlabel="network evaluations", ylabel="top-1 accuracy", percent=True, marked=True
    )
    return [Drawing("Accuracy by evaluations", "What the student's features were denoised with.", svg)]


def _series(run: Run, prefix: str) -> dict[str, plots.Curve]:
    keys = sorted({key for entry in run.log for key in entry if key.startswith(prefix)})
    found = {key.removeprefix(prefix): run.series("train", key) for key in keys}
    return {name: curve for name, curve in found.items() if curve[0]}


def _by_pair(run: Run) -> dict[str, dict[str, plots.Curve]]:
    """The parts of each pair, beside the task loss; of a method without pairs, its one distance."""
    grouped: dict[str, dict[str, plots.Curve]] = {}
    for prefix, words in _PARTS.items():
        for name, curve in _series(run, f"{prefix}_").items():
            grouped.setdefault(name, {})[words] = curve
        if (plain := run.series("train", prefix))[0]:
            grouped.setdefault("", {})[words] = plain
    if grouped and (task := run.series("train", "task"))[0]:
        grouped = {name: {"task": task, **parts} for name, parts in grouped.items()}
    return grouped
