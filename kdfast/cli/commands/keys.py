"""``kdfast keys``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson


@guarded
def keys(
    command: Annotated[
        str,
        typer.Argument(
            help="teach, distill, synth, select, data-report, label, teach-generator or demo.",
            metavar="COMMAND",
        ),
    ],
    method: Annotated[
        str | None, typer.Argument(help="For distill: one method's own keys.", metavar="METHOD")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which keys a command takes in its recipe or as KEY=VALUE: defaults, what is accepted, what they mean."""
    from kdfast.errors import ConfigError
    from kdfast.experiments.distill.methods import METHODS
    from kdfast.experiments.keys import as_text, keys_of_command, keys_of_method

    found = keys_of_command(command)
    if method is not None and command != "distill":
        raise ConfigError(f"method: got {method!r}, accepted: none; only distill has methods")
    if method is not None:
        found = keys_of_method(method)
    elif command == "distill":
        found += [key for name in METHODS for key in keys_of_method(name)]
    typer.echo(json.dumps([asdict(key) for key in found]) if as_json else as_text(found))
