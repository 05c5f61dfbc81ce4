"""``kdfast select``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson, Data, Out, Overrides, Quiet, Resume, TeacherRun
from kdfast.cli.values import config_of, show


@guarded
def select(
    data: Data,
    teacher: TeacherRun,
    out: Out,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Images to pick; by default 50000.", show_default=False)
    ] = None,
    shared: Annotated[
        Path | None,
        typer.Option(
            help="File with the classes that data and teacher share: makes two subsets.", metavar="FILE"
        ),
    ] = None,
    long_tail: Annotated[
        float | None,
        typer.Option(min=1, help="A long tail instead of equal shares: largest class over smallest."),
    ] = None,
    index_only: Annotated[
        bool, typer.Option("--index-only", help="Write the picked images' numbers, no shards.")
    ] = False,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Pick images that cover a teacher's classes evenly, and write them as new shards."""
    from kdfast.experiments.select.config import SelectConfig
    from kdfast.experiments.select.run import run

    config = config_of(
        SelectConfig,
        None,
        overrides,
        command="select",
        data=data,
        teacher=teacher,
        out=str(out),
        budget=budget,
        shared=None if shared is None else str(shared),
        long_tail=long_tail,
        index_only=index_only or None,
        resume=resume,
        progress=not quiet,
    )
    show(run(config), as_json)
