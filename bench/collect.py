"""A campaign's rows as results and tables: python -m bench.collect OUT.

Writes ``bench/results/GPU/DATE/campaign/`` (results.json and results.md as ``kdfast bench`` writes them, tests.md with
what was checked, ncu.csv where there is one), and the README's tables from all results. A dry run is not collected: its
times mean nothing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast.benchmarks.journal import Journal
from kdfast.benchmarks.run import SUITES, write
from kdfast.errors import ConfigError

ROOT = Path(__file__).parents[1]


def result_of(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows as one result: of a case that was measured twice, the row in which more providers were timed, else the
    later one; suites in their usual order.

    Raises:
        ConfigError: No environment was recorded, or rows come from two devices.
    """
    environments = [record for record in records if record.get("kind") == "environment"]
    if not environments:
        raise ConfigError(
            "collect: no environment in results.jsonl; the campaign ended before its first part did"
        )
    names = sorted({record["name"] for record in environments})
    if len(names) > 1:
        raise ConfigError(f"collect: rows of {' and of '.join(names)} in one results.jsonl")
    best: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.get("kind") == "case":
            row = record["row"]
            if row["key"] not in best or _timed(row) >= _timed(best[row["key"]]):
                best[row["key"]] = row
    errors = [
        f"{record.get('key') or record.get('suite') or record['part']}: {record.get('error', 'the process ended')}"
        for record in records
        if record.get("kind") in ("error", "crash")
    ]
    told = {key: value for key, value in environments[-1].items() if key != "kind"}
    return {
        **told,
        "cases": sorted(best.values(), key=lambda row: SUITES.index(row["suite"])),
        "errors": errors,
    }


def _timed(row: dict[str, Any]) -> int:
    return sum(bool(provider.get("seconds")) for provider in row["providers"])


def checks(records: Sequence[dict[str, Any]]) -> str:
    """What was tested and compared, as markdown: counts, then everything that was not right."""
    tests = {record["id"]: record for record in records if record.get("kind") == "test"}
    counts = Counter(record["outcome"] for record in tests.values())
    smoke = {record["name"]: record for record in records if record.get("kind") == "smoke"}
    parts = {record["part"]: record for record in records if record.get("kind") == "part"}
    lines = ["# What was checked", "", "| Part | Verdict | Seconds |", "|---|---|---|"]
    lines += [f"| {name} | {part['verdict']} | {part['seconds']:.0f} |" for name, part in parts.items()]
    lines += [
        "",
        f"Tests: {', '.join(f'{count} {name}' for name, count in sorted(counts.items())) or 'none'}.",
    ]
    lines += ["", "| Against float64 | Error | Limit |", "|---|---|---|"]
    lines += [f"| {name} | {_figure(row['error'])} | {row.get('limit', '')} |" for name, row in smoke.items()]
    for record in tests.values():
        if record["outcome"] == "failed":
            lines += ["", f"## {record['id']}", "", "```text", record.get("text", "").strip(), "```"]
    return "\n".join(lines) + "\n"


def _figure(error: float | str) -> str:
    return error if isinstance(error, str) else f"{error:.2e}"


def folder(result: dict[str, Any], into: Path) -> Path:
    """Where a result belongs: the device's name in small letters and hyphens, and the day."""
    device = re.sub(r"[^a-z0-9]+", "-", result["name"].lower()).strip("-")
    return into / device / result["started"][:10] / "campaign"


def collect(out: Path, into: Path) -> list[Path]:
    """Write what a campaign found; the files.

    Raises:
        ConfigError: There are no rows, or only those of a dry run.
    """
    records = Journal(out / "results.jsonl").records()
    if not records:
        raise ConfigError(f"collect: no rows in {out / 'results.jsonl'}")
    result = result_of(records)
    if result["tiny"]:
        raise ConfigError(f"collect: {out} holds a dry run, whose times mean nothing")
    target = folder(result, into)
    files = write(result, target, plots=False)
    (target / "checks.md").write_text(checks(records))
    files.append(target / "checks.md")
    if (out / "ncu.csv").exists():
        files.append(Path(shutil.copy(out / "ncu.csv", target / "ncu.csv")))
    return files


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.collect", description=__doc__)
    parser.add_argument("out", type=Path, help="what bench/gpu_campaign.sh wrote into")
    parser.add_argument("--into", type=Path, default=ROOT / "bench" / "results")
    given = parser.parse_args()
    try:
        for path in collect(given.out, given.into):
            print(f"wrote {path}")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if given.into == ROOT / "bench" / "results":
        from bench import readme_table

        sys.argv = ["readme_table"]
        return readme_table.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
