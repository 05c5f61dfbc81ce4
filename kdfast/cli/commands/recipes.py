"""``kdfast recipes``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson


@guarded
def recipes(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="A method, to list its recipes alone; or show and a recipe's name.",
            metavar="[METHOD | show NAME]",
            show_default=False,
        ),
    ] = None,
    cell: Annotated[
        str | None, typer.Option(help="With show: which cell of a table.", metavar="CELL", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the papers' tables that come with kdfast, or show one: its recipe, what it needs, whether that is there."""
    from kdfast.errors import ConfigError
    from kdfast.experiments import recipes as known

    words = words or []
    if words[:1] == ["show"] and len(words) == 2:
        found = known.describe(words[1], cell)
        typer.echo(json.dumps(found) if as_json else known.as_text(found))
        return
    if len(words) > 1 or words == ["show"] or cell is not None:
        raise ConfigError(
            f"recipes: got {' '.join(words)!r}, accepted: nothing, a METHOD, or show NAME [--cell CELL]"
        )
    rows = known.listing(words[0] if words else None)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        cells = f"{row['cells']:>3} cell{'s' if row['cells'] != 1 else ' '}" if row["cells"] else " " * 9
        small = "  (has a miniature)" if row["small"] else ""
        where = f"{row['source']}: " if row["source"] not in ("", "ours") else ""
        typer.echo(f"{row['name']:<{width}}  {cells}  {where}{row['title']}{small}")
