"""``kdfast teach``."""

from __future__ import annotations

from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson, DryRun, LabelledData, Out, Overrides, Quiet, RecipeFile, Resume
from kdfast.cli.values import config_of, show


@guarded
def teach(
    out: Out,
    data: LabelledData = None,
    recipe: RecipeFile = None,
    model: Annotated[str | None, typer.Option(help="Network, e.g. resnet20, wrn_40_2.")] = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Train a teacher on real, labelled images."""
    from kdfast.experiments.teach.config import TeachConfig
    from kdfast.experiments.teach.run import run

    config = config_of(TeachConfig, recipe, overrides, command="teach", data=data, model=model)
    show(run(config, out, resume=resume, dry_run=dry_run, progress=not quiet), as_json)
