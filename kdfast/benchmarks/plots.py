"""Results as figures: how much faster than whom, how close to a copy, how time grows with size.

Like the table, everything is computed from the raw samples: a provider that did not take part is nowhere, and a ratio
is of samples of one kind.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdfast.benchmarks.timing import KINDS, speedup
from kdfast.report.plots import PALETTE, figure, save_svg, to_svg

__all__ = ["Ratio", "draw", "rates", "ratios", "sweeps"]


class Ratio(NamedTuple):
    """kdfast beside one provider of one case.

    Attributes:
        suite: The case's.
        case: Its name and sizes.
        provider: Who kdfast is compared with.
        speedup: Above 1, kdfast is that many times as fast (:func:`kdfast.benchmarks.timing.speedup`).
        ours: kdfast's median, in seconds.
    """

    suite: str
    case: str
    provider: str
    speedup: float
    ours: float


def title(row: Mapping[str, Any]) -> str:
    """A case's name with its sizes, for people."""
    plain = ("shape", "dtype")  # values that say what they are
    sizes = (str(value) if name in plain else f"{name} {value}" for name, value in row["params"].items())
    return f"{row['suite']}: {row['case']} ({', '.join(sizes)})"


def ratios(result: Mapping[str, Any]) -> Iterator[Ratio]:
    """Every comparison of a result: for each provider the most telling kind of samples that both have."""
    for row in result["cases"]:
        timed = {p["name"]: p for p in row["providers"] if p.get("seconds")}
        for name, provider in timed.items():
            ours = timed.get(provider.get("against", "kdfast"))
            if ours is None or name.startswith("kdfast"):
                continue
            kind = next((k for k in KINDS if k in provider["seconds"] and k in ours["seconds"]), None)
            if kind is not None:
                theirs, mine = (p["seconds"][kind] for p in (provider, ours))
                yield Ratio(row["suite"], title(row), name, speedup(theirs, mine), statistics.median(mine))


class Rate(NamedTuple):
    """How fast a provider moved the bytes that its formula counts."""

    case: str
    provider: str
    num_bytes: float
    bytes_per_second: float


def rates(result: Mapping[str, Any]) -> Iterator[Rate]:
    """Every provider whose bytes were counted."""
    for row in result["cases"]:
        for provider in row["providers"]:
            if provider.get("seconds") and "bytes" in provider:
                kind = next(k for k in KINDS if k in provider["seconds"])
                seconds = statistics.median(provider["seconds"][kind])
                yield Rate(title(row), provider["name"], provider["bytes"], provider["bytes"] / seconds)


Points = dict[str, list[tuple[float, float]]]


def sweeps(result: Mapping[str, Any]) -> dict[str, Points]:
    """By case name, where it was run at several sizes: (items, seconds) of each provider, in order of size."""
    found: dict[tuple[str, str], Points] = defaultdict(lambda: defaultdict(list))
    for row in result["cases"]:
        size = row["working_set_bytes"]
        for provider in row["providers"]:
            if size and provider.get("seconds"):
                kind = next(k for k in KINDS if k in provider["seconds"])
                point = (size, statistics.median(provider["seconds"][kind]))
                found[row["suite"], row["case"]][provider["name"]].append(point)
    several = {}
    for (suite, case), providers in found.items():
        kept = {name: sorted(points) for name, points in providers.items() if len(points) > 1}
        if kept:
            several[f"{suite}: {case}"] = kept
    return several


def draw(result: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the figures that this result has something for: ratios.svg, roof.svg, sweeps.svg.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    written = []
    found = list(ratios(result))
    if found:
        written.append(save_svg(out / "ratios.svg", _ratio_bars(found)))
    counted = list(rates(result))
    if any(rate.provider.startswith("kdfast") for rate in counted):
        copy = statistics.median(result["copy_bytes_per_second"])
        written.append(save_svg(out / "roof.svg", _roof(counted, copy)))
    several = sweeps(result)
    if several:
        written.append(save_svg(out / "sweeps.svg", _sweep_panels(several)))
    return written


def _ratio_bars(found: Sequence[Ratio]) -> str:
    """A bar for each comparison, from 1: to the right kdfast is faster, to the left slower."""
    rows: list[Ratio | str] = []
    for ratio in found:
        if ratio.case not in rows:
            rows.append(ratio.case)
        rows.append(ratio)
    with figure(9.2, 0.26 * len(rows) + 0.9) as (drawing, axes):
        for place, row in enumerate(rows):
            if isinstance(row, str):
                axes.text(
                    0.0,
                    place,
                    row,
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    fontsize=8.5,
                    gid="name",
                )
                continue
            axes.barh(place, row.speedup - 1, left=1, color=_kind_color(row.provider), height=0.72)
            axes.vlines(1, place - 0.5, place + 0.5, color="#010203", linewidth=0.8)  # not through the names
            right = row.speedup >= 1
            axes.annotate(
                f"{row.speedup:.2f}×  {row.provider}",
                (max(row.speedup, 1), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                fontweight="normal" if right else "bold",
            )
        axes.set_xscale("log", base=2)
        highest = max(2.0, *(ratio.speedup for ratio in found))
        axes.set_xlim(min(0.5, *(ratio.speedup for ratio in found)) / 1.2, highest * 4)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.set_ylim(len(rows) - 0.3, -0.7)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("kdfast's speed relative to that provider's: to the left of 1 it is slower")
        return to_svg(drawing)


def _roof(counted: Sequence[Rate], copy: float) -> str:
    """Bytes a call against bytes a second, under the line that a copy draws."""
    colors = _colors([rate.provider for rate in counted])
    with figure(7.2, 3.8) as (drawing, axes):
        for number, (provider, color) in enumerate(colors.items()):
            own = [rate for rate in counted if rate.provider == provider]
            axes.scatter(
                [rate.num_bytes for rate in own],
                [rate.bytes_per_second / 1e9 for rate in own],
                color=color,
                marker="osD^v"[number % 5],
                label=provider,
                zorder=3,
            )
        axes.axhline(copy / 1e9, color="#010203", linewidth=1, linestyle="--")
        axes.annotate(
            f"a copy: {copy / 1e9:.3g} GB/s", (0.99, copy / 1e9), xycoords=("axes fraction", "data"),
            xytext=(0, 4), textcoords="offset points", ha="right", fontsize=8.5,
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("bytes a call moves, by its formula (what a cache holds may pass the line)")
        axes.set_ylabel("GB/s")
        _plain_numbers(axes.yaxis)
        axes.legend()
        return to_svg(drawing)


def _sweep_panels(several: Mapping[str, Points]) -> str:
    """Time against the bytes of one call's inputs, a panel for each case."""
    colors = _colors([name for providers in several.values() for name in providers])
    with figure(9.2, 3.0 * ((len(several) + 1) // 2) + 0.3, panels=len(several)) as (drawing, panels):
        for axes, (name, providers) in zip(panels, several.items()):
            for provider, points in providers.items():
                x, y = zip(*points)
                axes.plot(x, [1e6 * value for value in y], marker="o", color=colors[provider], label=provider)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("bytes of inputs")
            axes.set_ylabel("µs")
            axes.legend(fontsize=8)
            _plain_numbers(axes.yaxis)
        return to_svg(drawing)


def _kind_color(provider: str) -> str:
    """One colour for eager PyTorch, one for torch.compile, one for libraries; which of them is written at the bar."""
    kinds = {"eager": 1, "torch.compile": 2}
    return PALETTE[kinds.get(provider.split(",")[0].removesuffix(" PyTorch"), 3)]


def _colors(names: Sequence[str]) -> dict[str, str]:
    """One for each provider; kdfast's is the palette's first wherever it appears."""
    others = [name for name in dict.fromkeys(names) if name != "kdfast"]
    return {"kdfast": PALETTE[0]} | {
        name: PALETTE[1:][i % (len(PALETTE) - 1)] for i, name in enumerate(others)
    }


def _plain_numbers(axis: Any) -> None:
    for which in (axis.set_major_formatter, axis.set_minor_formatter):
        which(lambda value, _: f"{value:g}")
