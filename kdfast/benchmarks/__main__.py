"""``python -m kdfast.benchmarks``: needs nothing but the core, where ``kdfast bench`` needs the extra ``train``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kdfast.benchmarks.run import SUITES, make_settings, run, succeeded, write
from kdfast.errors import KDFastError


def main() -> int:
    """Parse, run, print; 1 if a suite stopped, kdfast failed or a provider was wrong."""
    parser = argparse.ArgumentParser(prog="python -m kdfast.benchmarks", description=__doc__)
    parser.add_argument("--suite", action="append", choices=SUITES, help="may be repeated; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes: a trial whose times mean nothing"
    )
    parser.add_argument("--list", action="store_true", help="print the suites' names, and measure nothing")
    parser.add_argument("--out", type=Path, help="directory for results.json, results.md and plots")
    given = parser.parse_args()
    if given.list:
        print(*SUITES)
        return 0
    if given.out is None:
        parser.error("--out is needed")
    settings = make_settings(given.device, quick=given.quick, tiny=given.tiny)
    try:
        result = run(given.suite or SUITES, settings, out=given.out)
    except KDFastError as error:
        print(f"kdfast.benchmarks: {error}", file=sys.stderr)
        return 2
    for path in write(result, given.out):
        print(f"wrote {path}")
    return 0 if succeeded(result) else 1


if __name__ == "__main__":
    sys.exit(main())
