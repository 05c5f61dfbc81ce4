"""``kdfast reproduce``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson, Out, Overrides, Quiet
from kdfast.cli.values import show


@guarded
def reproduce(
    ctx: typer.Context,
    table: Annotated[
        str,
        typer.Argument(help="A table, as kdfast recipes lists them.", metavar="TABLE", show_default=False),
    ],
    out: Out,
    cell: Annotated[
        list[str] | None,
        typer.Option(
            help="A cell; may be repeated. All of them without.", metavar="CELL", show_default=False
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="full, or small: the same table on a small set, minutes on a CPU.")
    ] = "full",
    seeds: Annotated[int, typer.Option(min=1, help="Students of each cell; reports mean ± std.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands that are left, run nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Reproduce a paper's table: teachers, images, students, and a page with the paper's values beside ours.

    What is there already is used; the same command again goes on where it stopped.
    """
    from kdfast.experiments.common.recipe import build_config, parse_overrides
    from kdfast.experiments.reproduce.config import ReproduceConfig
    from kdfast.experiments.reproduce.run import run, summary

    values: dict[str, Any] = {
        "table": table,
        "out": str(out),
        "cells": cell or [],
        "scale": scale,
        "seeds": seeds,
    }
    values |= {"dry_run": dry_run, "progress": not quiet, "overrides": parse_overrides(overrides or [])}
    group: Any = ctx.find_root().command

    def execute(words: Sequence[str]) -> int:
        words = [*words, *(["--quiet"] if quiet else [])]
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for this command's own result
            status = group.main(args=list(words), prog_name="kdfast", standalone_mode=False)
        return int(status or 0)

    result = run(build_config(ReproduceConfig, values, source="reproduce"), execute)
    if as_json:
        typer.echo(json.dumps(result))
    elif dry_run:
        typer.echo("\n".join([*result["commands"], *(f"# bring {need}" for need in result["missing"])]))
    else:
        show(summary(result), as_json=False)
