"""The figures of a data report: pictures by class, histograms, and the plane of a teacher's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.report.plots import PALETTE, to_svg
from kdfast.report.plots import figure as new_figure

# Enough for ten classes to be told apart on white and on near-black; more classes share colours.
CLASS_COLORS = (*PALETTE, "#8c6bb1", "#7f7f7f", "#b15928", "#17becf")
Images = NDArray[np.uint8]


def sheet(
    rows: Sequence[Sequence[Images | None]], *, columns: Sequence[str] = (), names: Sequence[str] = ()
) -> str:
    """Pictures in rows and columns, with names above and beside them.

    Args:
        rows: uint8 ``[3, H, W]`` each, or ``None`` for a gap; all of one size.
        columns: Heading of each column.
        names: Name of each row.

    Returns:
        The SVG element.
    """
    first = next(image for row in rows for image in row if image is not None)
    height, width = first.shape[1:]
    gap = max(1, height // 16)
    wide = max(len(row) for row in rows)
    canvas = np.zeros((len(rows) * (height + gap) - gap, wide * (width + gap) - gap, 4), np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image is not None:
                top, left = y * (height + gap), x * (width + gap)
                canvas[top : top + height, left : left + width, :3] = image.transpose(1, 2, 0)
                canvas[top : top + height, left : left + width, 3] = 255
    ratio = canvas.shape[0] / canvas.shape[1]
    with new_figure(9.2, 9.2 * ratio * (0.93 if names else 1) + (0.3 if columns else 0.1)) as (figure, axes):
        axes.imshow(canvas, interpolation="none", aspect="equal")
        centres = [(width + gap) * x + width / 2 for x in range(wide)]
        axes.xaxis.tick_top()
        size = 10 if wide <= 12 else 8
        axes.set_xticks(centres[: len(columns)], labels=list(columns), fontsize=size)
        middles = [(height + gap) * y + height / 2 for y in range(len(rows))]
        axes.set_yticks(middles[: len(names)], labels=list(names), fontsize=size)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return to_svg(figure)


def shares(counts: Mapping[str, float], *, xlabel: str) -> str:
    """How many images fall to each class, with a line where all would be alike; sorted where there are many."""
    values = np.array(list(counts.values()), float)
    values = values / values.sum()
    with new_figure(9.2, 2.6) as (figure, axes):
        if len(values) <= 40:
            axes.bar(range(len(values)), values, 0.8, color=PALETTE[0])
            labels = [name if len(name) <= 12 else f"{name[:11]}…" for name in counts]
            long = max(map(len, labels)) * len(labels) > 90
            axes.set_xticks(
                range(len(values)),
                labels=labels,
                rotation=45 if long else 0,
                ha="right" if long else "center",
            )
        else:
            axes.fill_between(
                range(len(values)), np.sort(values)[::-1], color=PALETTE[0], step="mid", linewidth=0
            )
            xlabel = f"{xlabel}, most predicted first"
        axes.axhline(1 / len(values), color=PALETTE[5], linewidth=1.4, linestyle=(0, (4, 3)))
        axes.annotate(
            "even", (1, 1 / len(values)), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", color=PALETTE[5], va="center",
        )  # fmt: skip
        axes.set_ylim(bottom=0)
        _of_images(axes, xlabel)
        return to_svg(figure)


def _of_images(axes: Any, xlabel: str) -> None:
    """Label axes whose heights are shares of the images."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("share of the images")


def histogram(
    values: NDArray[np.floating[Any]], *, xlabel: str, mark: float | None = None, note: str = ""
) -> str:
    """Shares in twenty bins from 0 to 1; ``mark`` is a place on the axis with a note at it."""
    counts, edges = np.histogram(values, bins=20, range=(0, 1))
    with new_figure(5.2, 2.9) as (figure, axes):
        axes.bar(edges[:-1], counts / max(counts.sum(), 1), 0.046, align="edge", color=PALETTE[0])
        if mark is not None:
            axes.axvline(mark, color=PALETTE[5], linewidth=1.4, linestyle=(0, (4, 3)))
            axes.annotate(
                note, (mark, 0.97), xycoords=("data", "axes fraction"), xytext=(-4, 0),
                textcoords="offset points", ha="right", va="top", color=PALETTE[5],
            )  # fmt: skip
        axes.set_xlim(0, 1)
        _of_images(axes, xlabel)
        return to_svg(figure)


def among(
    points: Mapping[str, Sequence[tuple[float, float]]],
    marks: Mapping[str, float],
    *,
    xlabel: str,
    ylabel: str,
) -> str:
    """Known points by group, and lines where the own values stand among them."""
    shapes = ("o", "s", "^", "D", "v", "P")
    with new_figure(9.2, 3.6) as (figure, axes):
        for number, (name, group) in enumerate(points.items()):
            x, y = zip(*group)
            axes.scatter(
                x,
                y,
                s=34,
                color=PALETTE[number % 6],
                marker=shapes[number % 6],
                label=name,
                linewidths=0,
                zorder=2,
            )
        for number, (name, value) in enumerate(marks.items()):
            axes.axvline(value, color="#010203", linewidth=1.6, linestyle=("-", (0, (4, 3)))[number % 2])
            side = -1 if value > 0.85 else 1
            axes.annotate(
                name, (value, 0.04 + 0.1 * number), xycoords=("data", "axes fraction"), xytext=(5 * side, 0),
                textcoords="offset points", ha="right" if side < 0 else "left", fontweight="bold",
            )  # fmt: skip
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(0, 1.1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        figure.legend(loc="outside right center")
        return to_svg(figure)


def plane(
    points: NDArray[np.floating[Any]],
    classes: NDArray[np.integer[Any]],
    *,
    names: Sequence[str],
    xlabel: str,
    ylabel: str,
    regions: tuple[NDArray[np.integer[Any]], tuple[float, float, float, float]] | None = None,
    wide: bool = False,
) -> str:
    """Points in a plane, coloured by class, on the regions that a network divides it into.

    Args:
        points: ``[N, 2]``.
        classes: ``[N]``.
        names: Of the classes.
        xlabel: Name of the x axis.
        ylabel: Name of the y axis.
        regions: Class of each cell of a grid ``[rows, columns]``, y upwards, and its extent (left, right, bottom, top).
        wide: As wide as the page, rather than half.

    Returns:
        The SVG element.
    """
    color = np.array([list(bytes.fromhex(value[1:])) for value in CLASS_COLORS], np.uint8)
    with new_figure(*((9.2, 4.6) if wide else (5.2, 4.6))) as (figure, axes):
        if regions is not None:
            grid, (left, right, bottom, top) = regions
            tint = np.dstack([color[grid % len(color)], np.full(grid.shape, 64, np.uint8)])
            axes.imshow(
                tint,
                extent=(left, right, bottom, top),
                origin="lower",
                aspect="auto",
                interpolation="none",
                zorder=0,
            )
            x = np.linspace(left, right, grid.shape[1])
            y = np.linspace(bottom, top, grid.shape[0])
            for label in np.unique(grid):
                axes.contour(x, y, grid == label, levels=[0.5], colors="#010203", linewidths=0.7, alpha=0.6)
            axes.set_xlim(left, right)
            axes.set_ylim(bottom, top)
        for label in np.unique(classes):
            mine = points[classes == label]
            axes.scatter(
                mine[:, 0], mine[:, 1], s=7, color=CLASS_COLORS[label % len(CLASS_COLORS)], linewidths=0,
                alpha=0.85, label=names[label] if label < len(names) else str(label), zorder=2,
            )  # fmt: skip
        axes.grid(visible=False)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if len(np.unique(classes)) <= 10:
            figure.legend(
                *axes.get_legend_handles_labels(), loc="outside lower center", ncols=10, markerscale=2,
                handletextpad=0, columnspacing=0.8,
            )  # fmt: skip
        return to_svg(figure)
