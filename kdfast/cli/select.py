"""``kdfast select``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.app import AsJson, Out, Overrides, Quiet, Resume, _show, _values
from kdfast.cli.guard import guarded

Data = Annotated[
    str,
    typer.Argument(
        help="A directory of shards, digits, a folder, or hf:NAME.", metavar="DATA", show_default=False
    ),
]
TeacherRun = Annotated[
    str,
    typer.Argument(help="Directory of a finished run.", metavar="TEACHER", show_default=False),
]


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
    from kdfast.experiments.common.recipe import build_config, check_keys
    from kdfast.experiments.select import run as work

    values = _values(
        None,
        overrides,
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
    check_keys(values, work.SelectConfig, source="select")
    _show(work.run(build_config(work.SelectConfig, values, source="select")), as_json)
