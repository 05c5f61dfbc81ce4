"""From the words of a command line to what a command takes, and from what it returns to lines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import typer

T = TypeVar("T")


def values_of(
    recipe: Path | None, overrides: list[str] | None, *, cell: str | None = None, **options: Any
) -> dict[str, Any]:
    """Recipe (of a table the cell), then options that were given, then KEY=VALUE words: the later wins."""
    from kdfast.experiments.common.recipe import load_recipe, parse_overrides

    values = load_recipe(recipe, cell) if recipe is not None else {}
    values |= {name: value for name, value in options.items() if value is not None}
    return values | parse_overrides(overrides or [])


def config_of(
    schema: type[T], recipe: Path | None, overrides: list[str] | None, *, command: str, **options: Any
) -> T:
    """The config of a command: of the recipe's values, the options that were given and the KEY=VALUE words.

    Args:
        schema: The config's class, a dataclass.
        recipe: YAML file, or ``None``.
        overrides: KEY=VALUE words.
        command: What an error names where there is no recipe.
        **options: By the config's field; ``None`` was not given.

    Raises:
        ConfigError: A key is unknown, or a value missing or invalid.
    """
    from kdfast.experiments.common.recipe import checked_config

    return checked_config(schema, values_of(recipe, overrides, **options), source=str(recipe or command))


def given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A command's ``locals()`` as fields of its config: paths as text, flags that were not given left out."""
    found = {
        name: value for name, value in parameters.items() if name not in ("quiet", "as_json", "overrides")
    }
    found = {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}
    return {name: value for name, value in found.items() if value not in (None, False, [])} | {
        "progress": not parameters["quiet"]
    }


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print what a command found, once however many processes there are."""
    if os.environ.get("RANK", "0") != "0":  # under torchrun all ranks have the same result
        return
    if as_json:
        typer.echo(json.dumps(result))
        return
    # What is nested is for programs: --json and metrics.json have it.
    lines = {name: value for name, value in result.items() if not isinstance(value, Mapping)}
    width = max((len(name) for name in lines), default=0)
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {_number(value)}")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_number(entry) for entry in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_number(entry)}" for key, entry in value.items())
    return str(value)
