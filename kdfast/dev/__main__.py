"""``python -m kdfast.dev``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kdfast.dev.skeleton import CHECKOUT, new_op
from kdfast.errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Parse, write, say what is left to do; 2 for what is refused."""
    parser = argparse.ArgumentParser(prog="python -m kdfast.dev", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "new-op", help="write the files of a working op, a row loss, to make your own of"
    )
    command.add_argument(
        "name", help="of the family, in snake case: `logit_mse` gives logit_mse_loss, LogitMseLoss"
    )
    command.add_argument(
        "--root", type=Path, default=CHECKOUT, help="the checkout; by default the one in use"
    )
    options = parser.parse_args(arguments)
    try:
        written, changed = new_op(options.name, options.root)
    except ConfigError as error:
        print(f"kdfast.dev: {error}", file=sys.stderr)
        return 2
    for what, paths in (("written", written), ("changed", changed)):
        print(f"{what}:", *paths, sep="\n  ")
    name = options.name.removesuffix("_loss")
    print(
        "It computes a squared error of logits. Put your equation into reference, kernel, tests, bench case and page;",
        "then:",
        f"  .venv/bin/python -m pytest tests/kernels/{name}",
        f"  TRITON_INTERPRET=1 .venv/bin/python -m pytest -m interpreter tests/kernels/{name}",
        "  .venv/bin/python -m bench.audit_table --fast --out docs/pages/kernels/audit.md",
        "  .venv/bin/python -m pytest tests/house tests/bench tests/kernels/test_audit.py",
        "  make lint docs",
        sep="\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
