"""``kdfast report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.guard import guarded, say


@guarded
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Directories of runs.", metavar="RUN...", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Directory for the page; by default a single run's own, and ./report for several.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw plots, sample grids and a page from runs; several are set side by side."""
    from kdfast.experiments.report import run

    for page in run(runs, out):
        say(f"wrote {page}")
