"""``kdfast doctor``."""

from __future__ import annotations

import json

import typer

from kdfast.cli.guard import FAILED, guarded
from kdfast.cli.options import AsJson


@guarded
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, which backend runs each op, what is missing and what installs it."""
    from kdfast.experiments import doctor as examine

    report = examine.run()
    typer.echo(json.dumps(report.as_dict(), indent=1) if as_json else report.as_text())
    if not report.healthy:
        raise typer.Exit(FAILED)
