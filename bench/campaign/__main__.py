"""``python -m bench.campaign OUT STAGE``: what bench/gpu_campaign.sh runs, once the tree is staged."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from bench.campaign.driver import OK, Shell, campaign
from bench.campaign.plan import BUDGET, CHECKERS, chosen
from kdfast.benchmarks.journal import Journal

#: How much more time everything gets in a dry run: nothing is timed there, and a busy machine builds for minutes.
DRY = 30.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.campaign", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("stage", type=Path)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    try:
        parts = chosen(os.environ.get("PARTS", ""))
        budget = float(os.environ.get("BUDGET", BUDGET))
        processes = int(os.environ.get("PROCESSES", CHECKERS))
    except ValueError as error:
        print(f"gpu_campaign: {error}", file=sys.stderr)
        return 2
    lacking = missing(dry=given.dry)
    if lacking:
        print(f"gpu_campaign: {lacking}", file=sys.stderr)
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    if given.dry:  # a CPU may be slow, and shared
        parts, budget = tuple(replace(part, seconds=DRY * part.seconds) for part in parts), DRY * budget
    journal = Journal(given.out / "results.jsonl")
    shell = Shell(given.out, given.stage, journal, dry=given.dry, processes=processes)
    shell.begin_build()
    verdicts = campaign(parts, journal, shell, budget=budget, say=lambda line: print(line, flush=True))
    print("\n".join(["", "== summary ==", *summary(journal), *(f"{n:<12} {v}" for n, v in verdicts.items())]))
    print(f"python -m bench.collect {given.out} makes tables of it.")
    return 0 if all(verdict == OK or verdict.startswith("absent") for verdict in verdicts.values()) else 1


def missing(*, dry: bool) -> str:
    """What stands against a campaign here; nothing, as a rule."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        return f"{sys.executable}: {error}"
    if not dry and not torch.cuda.is_available():
        return "torch finds no CUDA device; --dry-run tries every step on a CPU"
    return ""


def summary(journal: Journal) -> list[str]:
    """What the journal holds, in a few lines: tests, and providers that were wrong or failed."""
    records = journal.records()
    tests = Counter(r["outcome"] for r in records if r.get("kind") == "test")
    lines = [f"tests: {', '.join(f'{count} {name}' for name, count in tests.items()) or 'none'}"]
    for record in records:
        if record.get("kind") == "smoke" and not record["right"]:
            lines.append(f"WRONG {record['name']}: {record['error']}")
        elif record.get("kind") in ("check", "case"):
            for provider in record["row"]["providers"]:
                why = next((word for word in ("wrong", "failed") if word in provider), None)
                if why is not None:
                    lines.append(f"{why.upper()} {record['key']} {provider['name']}: {provider[why]}")
        elif record.get("kind") in ("crash", "error"):
            lines.append(f"{record['kind'].upper()} {record.get('key', record.get('suite', record['part']))}")
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    sys.exit(main())
