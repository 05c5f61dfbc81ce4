"""Figures, as SVG that takes its ink from the page: one file reads well in light and in dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdfast.errors import require

# Drawn in this colour, then replaced: matplotlib has no notion of the page's text colour.
_INK = "#010203"
# Okabe–Ito, without black and yellow: told apart by colour-blind readers, on white and on near-black.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kdfast",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}

Curve = tuple[Sequence[float], Sequence[float]]


def curves(
    series: Mapping[str, Curve],
    *,
    xlabel: str,
    ylabel: str,
    percent: bool = False,
    log: bool = False,
    first_color: int = 0,
    marked: bool = False,
    errors: Mapping[str, Sequence[float]] | None = None,
    log_x: bool = False,
) -> str:
    """Lines over a common axis.

    Args:
        series: x and y by name.
        xlabel: Name of the x axis.
        ylabel: Name of the y axis.
        percent: y are fractions to be shown in percent.
        log: Logarithmic y axis.
        first_color: Where in the palette the first line begins.
        marked: Put a dot at each point.
        errors: Half the height of an error bar at each point, by name.
        log_x: Logarithmic x axis, with a tick at every point.

    Returns:
        The SVG element.
    """
    with figure(5.2, 3.3) as (drawing, axes):
        for color, (name, (x, y)) in zip(
            itertools.islice(itertools.cycle(PALETTE), first_color, None), series.items()
        ):
            axes.plot(
                x, y, color=color, label=name, linewidth=1.8, marker="o" if marked or len(x) == 1 else None
            )
            if any((errors or {}).get(name, ())):
                axes.errorbar(x, y, (errors or {})[name], color=color, fmt="none", capsize=3, linewidth=1)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        if log:
            axes.set_yscale("log")
        if log_x:
            axes.set_xscale("log")
            ticks = sorted({value for x, _ in series.values() for value in x})
            axes.set_xticks(ticks, labels=[f"{value:,.10g}" for value in ticks])
            axes.xaxis.minorticks_off()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if len(series) > 1:
            axes.legend()
        return to_svg(drawing)


def bars(values: Mapping[str, float], *, xlabel: str, unit: str = "%") -> str:
    """Horizontal bars, with their value written beside them.

    Args:
        values: Number by name, top to bottom; fractions of 1 where the unit is percent.
        xlabel: What the numbers are.
        unit: Of the numbers.

    Returns:
        The SVG element.
    """
    with figure(9.2, 0.5 * len(values) + 0.8) as (drawing, axes):
        names = list(values)[::-1]
        drawn = axes.barh(names, [values[n] for n in names], color=PALETTE[0], height=0.62)
        for name, bar in zip(names, drawn):
            bar.set_color(PALETTE[list(values).index(name) % len(PALETTE)])
        if unit == "%":
            axes.bar_label(drawn, labels=[f"{100 * values[n]:.1f} %" for n in names], padding=5)
            axes.set_xlim(0, 1.12)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100 %"])
        else:
            axes.bar_label(drawn, labels=[f"{values[n]:,.3g} {unit}" for n in names], padding=5)
            axes.set_xlim(0, 1.12 * max(values.values()) or 1)
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        return to_svg(drawing)


def columns(
    series: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    ylabel: str,
    labels: Sequence[str] | None = None,
    percent: bool = False,
    wide: bool = False,
) -> str:
    """A column for each entry, side by side for several series; lines in steps where columns would be hairs.

    Args:
        series: Equally many numbers by name.
        xlabel: What the entries are.
        ylabel: What the numbers are.
        labels: Names of the entries; by default their number.
        percent: Numbers are fractions to be shown in percent.
        wide: For a figure that has the page's width to itself.

    Returns:
        The SVG element.
    """
    count = len(next(iter(series.values())))
    labels = labels or [str(number) for number in range(count)]
    with figure(9.2 if wide else 5.2, 3.3) as (drawing, axes):
        for number, (name, values) in enumerate(series.items()):
            color = PALETTE[number % len(PALETTE)]
            if len(series) > 1 and count * len(series) > 60:
                axes.stairs(
                    values, [n - 0.5 for n in range(count + 1)], color=color, label=name, linewidth=1.6
                )
                continue
            width = 0.84 / len(series)
            left = [n - 0.42 + (number + 0.5) * width for n in range(count)]
            axes.bar(left, values, width, color=color, label=name)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        # About ten names fit beside each other, fewer long ones.
        every = max(1, -(-count * max(len(label) for label in labels) // (90 if wide else 48)))
        shown = range(0, count, every)
        axes.set_xticks(list(shown), labels=[labels[n] for n in shown])
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if len(series) > 1:  # above: columns leave no corner free
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
        return to_svg(drawing)


def save_svg(path: Path, svg: str) -> Path:
    """Write a figure as a file of its own, whose ink follows the viewer's colour scheme."""
    light, dark = (
        "svg{color:#222;background:#fff;font-family:sans-serif}",
        "svg{color:#ddd;background:#16181d}",
    )
    style = f"<style>{light}@media(prefers-color-scheme:dark){{{dark}}}</style>"
    path.write_text(re.sub(r"(<svg[^>]*>)", rf"\1{style}", svg, count=1), encoding="utf-8")
    return path


@contextmanager
def figure(width: float, height: float, *, panels: int = 0) -> Iterator[tuple[Any, Any]]:
    """A matplotlib figure in the house style, and its axes; a list of them for ``panels``, two in a row.

    Without pyplot: no global state, no display, nothing to close.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="report", feature="plots")
    figures = require("matplotlib.figure", extra="report", feature="plots")
    with matplotlib.rc_context(_STYLE):
        drawing = figures.Figure(figsize=(width, height))
        if not panels:
            yield drawing, drawing.subplots()
            return
        every = drawing.subplots(-(-panels // 2), 2, squeeze=False).flatten()
        for unused in every[panels:]:
            unused.set_axis_off()
        yield drawing, list(every[:panels])


def _as_written(drawing: Any) -> None:
    """Take ``$`` in names of runs and classes for what it is: matplotlib reads mathematics between two of them."""
    text = require("matplotlib.text", extra="report", feature="plots")
    ticker = require("matplotlib.ticker", extra="report", feature="plots")
    for found in drawing.findobj(text.Text):
        found.set_parse_math(False)
    for axes in drawing.axes:
        for axis in (axes.xaxis, axes.yaxis):
            # Powers of ten are mathematics of matplotlib's own.
            if isinstance(axis.get_major_formatter(), ticker.LogFormatter):
                for label in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)):
                    label.set_parse_math(True)


def to_svg(drawing: Any) -> str:
    """The SVG element, whose ink is the page's."""
    _as_written(drawing)
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    # The width comes from the page's column, the font from its style.
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", body)
    body = re.sub(r"font-family: [^;\"]*", "font-family: inherit", body)
    return f"{head}>{body}".replace(_INK, "currentColor")
