"""``kdfast label``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson, Data, Overrides, Quiet, TeacherRun
from kdfast.cli.values import config_of, given, show


@guarded
def label(
    data: Data,
    teacher: TeacherRun,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the labels; by default that of the shards.", metavar="DIR", show_default=False
        ),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            min=1, help="Augmented views of each image, with augment=[crop,flip].", show_default=False
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the so many largest outputs; by default all.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Store a teacher's outputs for a set of images: students learn from them by `distill labels=stored`."""
    options = given(locals())
    from kdfast.experiments.label.config import LabelConfig
    from kdfast.experiments.label.run import run

    show(run(config_of(LabelConfig, None, overrides, command="label", **options)), as_json)
