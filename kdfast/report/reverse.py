"""Figures of runs that distil in the steps of a reverse process: the loss's parts, accuracy over extra parameters."""

from __future__ import annotations

from collections.abc import Mapping

from kdfast.report import plots
from kdfast.report.inversion import Drawing
from kdfast.report.runs import Run

_PARTS = {"task": "task", "middle": "middle", "guided": "target-guided"}


def part_figures(run: Run) -> list[Drawing]:
    """What the loss was made of over the steps, each before its weight; parts that are always 0 are left out."""
    found = {words: run.series("train", key) for key, words in _PARTS.items()}
    if not found["middle"][0]:
        return []
    found = {words: curve for words, curve in found.items() if any(curve[1])}
    positive = all(value > 0 for _, values in found.values() for value in values)
    svg = plots.curves(found, xlabel="step", ylabel="", log=positive)
    return [Drawing("Loss parts", "Each before its weight α or β.", svg)]


def parameter_figure(runs: Mapping[str, Run]) -> list[Drawing]:
    """Accuracy over what training has in parameters beyond the student (Kdiffusion, Fig. 3), of two runs or more."""
    found = {}
    for name, run in runs.items():
        # The runs of several seeds share the number; their summary has no single one.
        extra = next((r.metrics["extra_parameters"] for r in (run, *run.children) if _has(r)), None)
        value = run.metrics.get("accuracy_mean", run.metrics.get("accuracy"))
        if extra is not None and isinstance(value, float):
            found[name] = ([float(extra)], [value])
    if len({curve[0][0] for curve in found.values()}) < 2:
        return []
    svg = plots.curves(
        found, xlabel="extra training parameters", ylabel="top-1 accuracy", percent=True, marked=True
    )
    return [
        Drawing(
            "Extra parameters and accuracy", "Branches and bridges, all of them gone after training.", svg
        )
    ]


def _has(run: Run) -> bool:
    return isinstance(run.metrics.get("extra_parameters"), int)
