"""One process of a campaign: measures or checks the cases of a part, and appends each to the journal.

python -m bench.campaign.worker {environment,check,time} PART --rows FILE [--share I/N] [--dry]
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.campaign.driver import DEVICE_LOST
from bench.campaign.plan import PARTS, Part
from kdfast.benchmarks import environment
from kdfast.benchmarks.case import Case, Settings
from kdfast.benchmarks.journal import Journal
from kdfast.benchmarks.run import FORMAT, line_of, make_settings, measure, measured_on


def cases(part: Part, settings: Settings, journal: Journal, share: tuple[int, int]) -> Iterator[Case]:
    """What is left of the part's cases for this process, in its order; each is let go of when the next is asked for."""
    found: dict[str, Case] = {}
    for suite in part.suites:
        try:
            found |= {case.key: case for case in import_module(f"kdfast.benchmarks.{suite}").cases(settings)}
        except Exception as error:  # the other suites' cases are worth measuring
            text = f"{type(error).__name__}: {error}"
            journal.append({"kind": "error", "part": part.name, "suite": suite, "error": text})
            traceback.print_exc()
    wanted = {"check": "check", "time": "case"}[part.kind]
    over = {
        record.get("key")
        for record in journal.records()
        if record.get("part") == part.name and record.get("kind") in (wanted, "crash")
    }
    for key in part.order(found)[share[0] :: share[1]]:
        case = found.pop(key)
        if key not in over:
            kept = tuple(p for p in case.providers if not any(word in p.name for word in part.without))
            yield replace(case, providers=kept)


def work(part: Part, settings: Settings, journal: Journal, share: tuple[int, int]) -> int:
    """Measure what is left; how to exit."""
    timed = part.kind == "time"
    for case in cases(part, settings, journal, share):
        who = {"part": part.name, "key": case.key, "pid": os.getpid()}
        journal.append({"kind": "begin", **who})
        row = measure(case, settings, timed=timed)
        journal.append({"kind": "case" if timed else "check", **who, "row": row})
        print(line_of(row), flush=True)
        if settings.device == "cuda":
            del case
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:  # an illegal access stays for as long as the process does
                print(f"the device is lost to this process: {error}", flush=True)
                return DEVICE_LOST
    return 0


def describe(settings: Settings) -> dict[str, Any]:
    """The record that says what the campaign ran on."""
    return {
        "kind": "environment",
        "format": FORMAT,
        "device": settings.device,
        "name": environment.device_name(settings.device),
        "quick": settings.quick,
        "tiny": settings.tiny,
        **measured_on(settings),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.campaign.worker", description=__doc__)
    parser.add_argument("kind", choices=("environment", "check", "time"))
    parser.add_argument("part", choices=[part.name for part in PARTS])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--share", default="0/1", help="I/N: every Nth case, from the Ith on")
    parser.add_argument("--dry", action="store_true", help="smallest sizes, on the CPU")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = make_settings("cpu" if given.dry else "cuda", quick=True, tiny=given.dry)
    journal = Journal(given.rows)
    if given.kind == "environment":
        journal.append(describe(settings))
        return 0
    index, count = map(int, given.share.split("/"))
    part = next(part for part in PARTS if part.name == given.part)
    return work(part, settings, journal, (index, count))


if __name__ == "__main__":
    sys.exit(main())
