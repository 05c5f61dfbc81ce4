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
) -> None:
    """Draw plots, sample grids and a page from the metrics of runs."""
    from kdfast.experiments.report import run

    for page in run(runs):
        say(f"wrote {page}")
