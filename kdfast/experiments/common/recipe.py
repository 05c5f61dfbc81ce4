"""Recipes: YAML in, flat or a cell of a table; frozen dataclasses out; an error that helps for anything in between."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from kdfast.documents import shown
from kdfast.errors import ConfigError, require
from kdfast.experiments.common.tables import Table, check_table, is_table, open_recipe
from kdfast.yaml_documents import parse_yaml

T = TypeVar("T")


def load_recipe(source: str | Path, cell: str | None = None) -> dict[str, Any]:
    """Read a recipe's keys and values, unchecked.

    Args:
        source: A YAML file, flat or a table of cells, or the name of a recipe that comes with kdfast, such as
            ``dmkd/table-2``.
        cell: Which one of a table; not needed for a table of one.

    Raises:
        ConfigError: There is no such file or name, it is unreadable, not YAML, neither flat nor a table, or of several
            cells none was named.
    """
    name, document, former = open_recipe(source)
    if is_table(document):
        check_table(name, document)
        table, cell = Table(name, document), cell or former
        if cell is None and len(table.cells) == 1:
            cell = table.cells[0]
        if cell is None:
            some = ", ".join(table.cells[:4]) + (" …" if len(table.cells) > 4 else "")
            raise ConfigError(
                f"recipe {name}: has {len(table.cells)} cells, name one with --cell: {some} "
                f"(kdfast recipes show {name} lists them)"
            )
        return table.resolve(cell)
    if cell is not None:
        raise ConfigError(f"--cell: got {cell!r}, but recipe {name} is no table of cells")
    for key, value in document.items():
        if isinstance(value, dict):
            raise ConfigError(
                f"recipe {name}: {key}: got nested keys, accepted: one value (a recipe is flat, or a table with cells)"
            )
    return dict(document)


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn ``KEY=VALUE`` words into values, read as YAML would read them.

    Raises:
        ConfigError: A word has no ``=``, or its value is not YAML.
    """
    require("yaml", extra="train", feature="overriding a recipe's values")
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override: got {pair!r}, accepted: KEY=VALUE")
        name = key.strip()
        try:
            values[name] = parse_yaml(value, what=f"override {name}")
        except ConfigError as error:
            why = str(error).removeprefix(f"override {name}: ")
            raise ConfigError(f"override {name}: got {shown(value)}, which is not YAML: {why}") from error
    return values


def check_keys(values: Mapping[str, Any], *schemas: type, source: str) -> None:
    """Refuse keys that no schema has.

    Raises:
        ConfigError: Names every unknown key and the nearest known one.
    """
    known = sorted({field.name for schema in schemas for field in fields(schema)})
    unknown = [key for key in values if key not in known]
    if not unknown:
        return
    hints = []
    for key in unknown:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hints.append(f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    tail = "" if all("mean" in hint for hint in hints) else f"; known: {', '.join(known)}"
    raise ConfigError(f"{source}: {'; '.join(hints)}{tail}")


def checked_config(schema: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """:func:`build_config` of values that may have keys which no field of the schema has: these are refused first."""
    check_keys(values, schema, source=source)
    return build_config(schema, values, source=source)


def build_config(schema: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Make ``schema``, a dataclass, from those of the values that it has fields for.

    Numbers and paths written as strings are converted (YAML reads ``1e-4`` as a string).

    Raises:
        ConfigError: A required value is missing or one is invalid; says which, what it got and what is accepted.
    """
    pydantic = require("pydantic", extra="train", feature="checking a recipe")
    assert_dataclass(schema)
    hints = get_type_hints(schema)
    names = [field.name for field in fields(schema)]  # type: ignore[arg-type]
    given = {name: values[name] for name in names if name in values}
    problems = [
        f"{name}: got {shown(value)}, accepted: a number or text, not yes/no"
        for name, value in given.items()
        if isinstance(value, bool) and not _mentions_bool(hints[name])
    ]
    if not problems:
        try:
            made: T = pydantic.TypeAdapter(schema).validate_python(given)
            return made
        except pydantic.ValidationError as error:
            problems = _problems(error.errors())
    raise ConfigError(f"{source}: {'; '.join(problems)}")


def to_yaml(*configs: Any) -> str:
    """The flat YAML that builds these configs again."""
    yaml = require("yaml", extra="train", feature="writing a recipe")
    values: dict[str, Any] = {}
    for config in configs:
        values |= {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def assert_dataclass(schema: type) -> None:
    """Programming error, not the user's: a schema is always a dataclass."""
    if not is_dataclass(schema):
        raise TypeError(f"schema: got {schema!r}, accepted: a dataclass")


#: What pydantic says of Python's types, in a recipe's words.
_PLAIN = {
    "tuple_type": "a list, as in {}",
    "list_type": "a list, as in {}",
    "int_parsing": "a valid integer",
    "float_parsing": "a valid number",
}


def _problems(errors: Sequence[Mapping[str, Any]]) -> list[str]:
    found: dict[str, str] = {}
    for error in errors:
        location = [str(part) for part in error["loc"]]
        if not location:  # raised by the dataclass itself, and already in our words
            found[str(error["msg"])] = str(error["msg"]).removeprefix("Value error, ")
        elif error["type"] == "missing":
            found[location[0]] = f"{location[0]}: missing"
        else:
            accepted = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
            value = error["input"]
            example = f"[{value}]" if isinstance(value, str) else "[a, b]"
            accepted = _PLAIN.get(error["type"], accepted).replace("{}", example)
            # A value may be invalid as each of several types; the first says enough.
            found.setdefault(location[0], f"{location[0]}: got {shown(error['input'])}, accepted: {accepted}")
    lacking = [name for name, problem in found.items() if problem == f"{name}: missing"]
    if lacking:
        found[""] = f"in a shell: {' '.join(f'{name}=VALUE' for name in lacking)}"
    return list(found.values())


def _mentions_bool(hint: Any) -> bool:
    return hint is bool or any(_mentions_bool(part) for part in get_args(hint))
