"""Results as a markdown table; every figure is computed from the raw samples, none is typed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from kdfast.benchmarks.timing import KINDS, speedup

_HEAD = (
    "Provider",
    "Time",
    "Spread",
    "Rate",
    "Bytes",
    "GB/s",
    "of copy",
    "kdfast is",
    "Launches",
    "Syncs",
    "Peak",
)
_KIND_NAMES = {"graph": "graph replay", "events": "CUDA events", "wall": "wall time"}


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result: where it was measured, a table a case, and who was absent and why."""
    copy = statistics.median(result["copy_bytes_per_second"])
    lines = [f"# {result['name']}", ""]
    if result["tiny"]:
        lines += [
            "**A trial at the smallest sizes, to see that everything runs: these times mean nothing.**",
            "",
        ]
    lines += [
        *_environment(result),
        "",
        f"A copy in memory moves {copy / 1e9:.1f} GB/s here (read and written); *of copy* is relative to that.",
        "Times are medians; the spread is half the distance between the quartiles, relative to the median.",
        "*kdfast is* compares kdfast, configured alike, with that provider, on samples of one kind, round by round: "
        "the median of the rounds' quotients. 2.00× is twice as fast, 0.50× is half as fast.",
    ]
    for suite in dict.fromkeys(row["suite"] for row in result["cases"]):
        lines += ["", f"## {suite}"]
        for row in result["cases"]:
            if row["suite"] == suite:
                lines += ["", *case_table(row, copy)]
    if result["errors"]:
        lines += ["", "## What stopped", "", *(f"- {error}" for error in result["errors"])]
    return "\n".join(lines) + "\n"


def case_table(row: Mapping[str, Any], copy: float) -> list[str]:
    """One case: a row for each provider that took part, a line for each that did not."""
    sizes = ", ".join(f"{name} {value}" for name, value in row["params"].items())
    lines = [f"### {row['case']} ({sizes})", ""]
    timed = [provider for provider in row["providers"] if provider.get("seconds")]
    kinds = [kind for kind in KINDS if any(kind in provider["seconds"] for provider in timed)]
    for kind in kinds:
        taking_part = [provider for provider in timed if kind in provider["seconds"]]
        by_name = {provider["name"]: provider for provider in taking_part}
        lines += [f"{_KIND_NAMES[kind].capitalize()}:", "", _cells(_HEAD), _cells(["---"] * len(_HEAD))]
        lines += [
            _cells(_figures(provider, kind, row, copy, by_name.get(provider.get("against", "kdfast"))))
            for provider in taking_part
        ]
        lines.append("")
    for provider in row["providers"]:
        if "absent" in provider:
            lines.append(f"- {provider['name']} did not take part: {provider['absent']}")
        elif "failed" in provider:
            lines.append(f"- {provider['name']} raised and was not timed: {provider['failed']}")
        elif "wrong" in provider:
            lines.append(f"- {provider['name']} failed the check and was not timed: {provider['wrong']}")
    return lines[:-1] if lines[-1] == "" else lines


def spread(samples: list[float]) -> float:
    """Half the interquartile distance, relative to the median."""
    if len(samples) < 2:
        return float("nan")
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / 2 / statistics.median(samples)


def _figures(
    provider: Mapping[str, Any],
    kind: str,
    row: Mapping[str, Any],
    copy: float,
    ours: Mapping[str, Any] | None,
) -> list[str]:
    samples = provider["seconds"][kind]
    seconds = statistics.median(samples)
    rate = provider["bytes"] / seconds if "bytes" in provider else None
    ratio = ""
    if ours is not None and provider is not ours:
        ratio = f"{speedup(samples, ours['seconds'][kind]):.2f}×"
    name = provider["name"] + (f" ({provider['config']})" if provider["config"] else "")
    return [
        name,
        _time(seconds),
        f"± {100 * spread(samples):.1f} %",
        f"{_short(row['items'] / seconds)} {row['unit']}/s",
        provider.get("formula", ""),
        "" if rate is None else f"{rate / 1e9:.1f}",
        "" if rate is None else f"{100 * rate / copy:.0f} %",
        ratio,
        str(provider.get("launches", "")),
        str(provider.get("syncs", "")),
        _bytes(provider["peak_bytes"]) if "peak_bytes" in provider else "",
    ]


def _environment(result: Mapping[str, Any]) -> list[str]:
    environment = result["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    facts = [
        f"Measured {result['started']}, kdfast {environment['kdfast']} at {environment['commit'] or 'no revision'}",
        f"Python {environment['python']}, {packages}",
        f"{environment['cpu']}, {environment['cpus']} CPUs, 1 thread",
    ]
    if "load_average" in environment:
        loads = ", ".join(map(str, environment["load_average"]))
        facts.append(f"Load average at the start {loads}: above the number of CPUs, timings mean little")
    if "gpu" in environment:
        gpu = ("driver_version", "cuda", "clocks.sm", "clocks.mem", "power.limit")
        facts.append(", ".join(f"{name} {environment[name]}" for name in gpu if environment.get(name)))
    return [f"- {fact}" for fact in facts]


def _cells(values: Any) -> str:
    return f"| {' | '.join(values)} |"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value / (1 << 20):.1f} MiB"
