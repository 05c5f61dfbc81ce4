"""What moved between two results, beyond their noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.benchmarks.run import FORMAT, OUT
from kdfast.benchmarks.table import spread
from kdfast.benchmarks.timing import KINDS
from kdfast.documents import read_json, shown
from kdfast.errors import ConfigError

#: Below this no move is told of: two runs on a quiet machine differ by as much.
LEAST = 0.03
#: And below as many spreads of either run.
SPREADS = 3.0


@dataclass(frozen=True)
class Move:
    """One provider of one case, in both results.

    Attributes:
        key: The case.
        provider: Its name.
        kind: Of the samples compared.
        before: Median seconds.
        after: Median seconds.
        noise: Relative difference that the two runs' spreads explain.
    """

    key: str
    provider: str
    kind: str
    before: float
    after: float
    noise: float

    @property
    def change(self) -> float:
        """after / before − 1: positive is slower."""
        return self.after / self.before - 1

    @property
    def beyond_noise(self) -> bool:
        """Whether the two really differ."""
        return abs(math.log(self.after / self.before)) > self.noise


def load(path: Path) -> dict[str, Any]:
    """Read a results.json.

    Raises:
        ConfigError: It is missing or something else.
    """
    try:
        result: dict[str, Any] = read_json(path, error=ConfigError)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    try:
        if result["format"] != FORMAT or not isinstance(result["cases"], list):
            raise ConfigError(f"{path}: got format {shown(result['format'])}; {FORMAT} is needed")
        if not isinstance(result["name"], str) or not isinstance(result.get("errors", []), list):
            raise TypeError
        for row in result["cases"]:
            _check_row(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a results.json of kdfast bench ({type(error).__name__})") from error
    return result


def _check_row(row: Any) -> None:
    """What a comparison reads of a row; a wrong type is a TypeError, something missing a KeyError."""
    if not isinstance(row["key"], str) or not isinstance(row["providers"], list):
        raise TypeError
    for provider in row["providers"]:
        if not isinstance(provider["name"], str):
            raise TypeError
        for samples in provider.get("seconds", {}).values():
            if not samples or not all(
                isinstance(one, (int, float)) and 0 < one < math.inf for one in samples
            ):
                raise TypeError


def moves(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Move]:
    """Every provider that both results timed.

    Raises:
        ConfigError: They were measured on different devices, where a comparison says nothing.
    """
    if before["name"] != after["name"]:
        raise ConfigError(f"compare: results of {before['name']} and of {after['name']} cannot be compared")
    old = dict(_timed(before))
    found = []
    for (key, name), samples in _timed(after):
        if (key, name) in old:
            kind = next((k for k in KINDS if k in samples and k in old[key, name]), None)
            if kind is not None:
                pair = old[key, name][kind], samples[kind]
                noise = max(LEAST, SPREADS * math.hypot(*(_noise(run) for run in pair)))
                first, second = map(statistics.median, pair)
                found.append(Move(key, name, kind, first, second, noise))
    return found


def failures(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Why a gate between these two results stays shut, a line each; none lets it pass.

    What counts is kdfast: its rows that became slower beyond the noise, that were timed before and no longer are, or
    that failed; results that were wrong, whoever's; suites that stopped. Peers may become slower or vanish.
    """
    found = [
        f"{move.key}: {move.provider} takes {100 * move.change:+.1f} % (noise ± {100 * move.noise:.1f} %)"
        for move in moves(before, after)
        if _ours(move.provider) and move.beyond_noise and move.change > 0
    ]
    now = {key for key, _ in _timed(after)}
    why = {
        (row["key"], provider["name"]): f"{reason}: {provider[reason]}"
        for row in after["cases"]
        for provider in row["providers"]
        for reason in OUT
        if provider.get(reason)
    }
    for (key, name), _ in _timed(before):
        if _ours(name) and (key, name) not in now:
            found.append(
                f"{key}: {name} was timed before and is not now ({why.get((key, name), 'no such row')})"
            )
    told = {(key, name) for (key, name), _ in _timed(before) if (key, name) not in now}
    for (key, name), reason in why.items():
        failed = reason.startswith("wrong") or (reason.startswith("failed") and _ours(name))
        if failed and not (_ours(name) and (key, name) in told):
            found.append(f"{key}: {name} {reason}")
    return [*found, *(f"stopped: {error}" for error in after.get("errors", ()))]


def _ours(provider: str) -> bool:
    return provider.startswith("kdfast")


def _timed(result: Mapping[str, Any]) -> list[tuple[tuple[str, str], dict[str, list[float]]]]:
    return [
        ((row["key"], provider["name"]), provider["seconds"])
        for row in result["cases"]
        for provider in row["providers"]
        if provider.get("seconds")
    ]


def _noise(samples: list[float]) -> float:
    width = spread(samples)
    return 1.0 if math.isnan(width) else width  # one sample says nothing about its noise


def markdown(found: list[Move]) -> str:
    """What moved, the worst first; then how much did not."""
    moved = sorted((move for move in found if move.beyond_noise), key=lambda move: -move.change)
    lines = []
    if moved:
        lines += ["| Case | Provider | Before | After | Change | Noise |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {move.key} | {move.provider} | {move.before * 1e6:.1f} µs | {move.after * 1e6:.1f} µs "
            f"| {100 * move.change:+.1f} % | ± {100 * move.noise:.1f} % |"
            for move in moved
        ]
        lines.append("")
    lines.append(f"{len(moved)} of {len(found)} moved beyond the noise.")
    return "\n".join(lines) + "\n"
