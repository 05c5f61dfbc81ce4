"""``kdfast distill``."""

from __future__ import annotations

from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson, DryRun, Out, Overrides, Quiet, RecipeFile, Resume
from kdfast.cli.values import show, values_of


@guarded
def distill(
    out: Out,
    recipe: RecipeFile = None,
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
    """Distil a student from a teacher, as a recipe or the keys at the end of the line say."""
    from kdfast.experiments.distill.run import parse, run, run_seeds

    values = values_of(recipe, overrides, cell=cell, loader=loader)
    config, method = parse(values, source=str(recipe or "distill"))
    if seeds > 1 and not dry_run:
        result = run_seeds(config, method, out, seeds=seeds, resume=resume, progress=not quiet)
    else:
        result = run(config, method, out, resume=resume, dry_run=dry_run, progress=not quiet)
    show(result, as_json)
