"""``kdfast distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson, DryRun, Out, Overrides, Quiet, Resume
from kdfast.cli.values import show, values_of


@guarded
def distill(
    recipe: Annotated[
        Path,
        typer.Option(
            help="YAML with the method and its values, or the name of a recipe that comes with kdfast.",
            metavar="FILE|NAME",
            show_default=False,
        ),
    ],
    out: Out,
    cell: Annotated[
        str | None, typer.Option(help="Which cell of a table.", metavar="CELL", show_default=False)
    ] = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each with its own seed; reports mean ± std.")] = 1,
    loader: Annotated[str | None, typer.Option(help="dali, or torch for the plain loader.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Distil a student from a teacher, as a recipe says."""
    from kdfast.experiments.distill.run import parse, run, run_seeds

    config, method = parse(values_of(recipe, overrides, cell=cell, loader=loader), source=str(recipe))
    if seeds > 1 and not dry_run:
        result = run_seeds(config, method, out, seeds=seeds, resume=resume, progress=not quiet)
    else:
        result = run(config, method, out, resume=resume, dry_run=dry_run, progress=not quiet)
    show(result, as_json)
