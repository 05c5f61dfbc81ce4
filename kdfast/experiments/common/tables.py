"""Recipes as tables: one file a table or figure of a paper, one cell an experiment.

A table is YAML with these keys, of which ``cells`` is required:

- ``title``, ``source``: what it is, and where in which paper;
- ``common``: what all cells share; ``parts``: what several do, by a name that a cell's ``use`` lists;
- ``cells``: by name, what differs, and ``paper``: the value that the paper reports, accuracies in
  per cent;
- ``metric``: what that value is (``accuracy`` by default, or ``miou``);
- ``ours``: what the paper does not say and we chose, with the reason; ``notes``: where it contradicts itself;
- ``teacher``, ``data``: by path, the command that makes it, or ``bring``: what has to be put there. ``{NAME}`` in a
  path stands for any text without a slash, and for that text in the command;
- ``miniature``: the same cells on a small set: ``map`` from values to stand-ins, ``common`` over everything, ``cells``
  to take, and ``teacher`` and ``data`` of its own;
- ``formerly``: what a cell was called when each had a file of its own: a prefix, or old names with their cells.

A cell's recipe is ``common``, its ``parts`` in order and its own keys; the later wins.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from kdfast.documents import read_text, shown
from kdfast.errors import ConfigError, require
from kdfast.yaml_documents import MAX_RECIPE, parse_yaml

_KEYS = {
    *(
        "title",
        "source",
        "metric",
        "notes",
        "ours",
        "formerly",
        "common",
        "parts",
        "cells",
        "teacher",
        "data",
    ),
    "miniature",
}
_CELL_KEYS = ("use", "paper")
_MINIATURE_KEYS = {"note", "map", "common", "cells", "teacher", "data"}
#: Who teaches whom on what, before how.
_FIRST = ("method", "teacher", "student", "data", "test_data")
#: Keys of a recipe whose values may be paths that a table says how to make.
_PATHS = ("teacher", "data", "test_data")


@dataclass(frozen=True)
class Need:
    """Something that a cell needs.

    Attributes:
        path: Where it is expected, as recipes and commands write it.
        commands: What makes it, in order; empty where it has to be brought.
        bring: What has to be put there; empty where commands make it.
    """

    path: str
    commands: tuple[str, ...] = ()
    bring: str = ""

    @property
    def words(self) -> list[list[str]]:
        """The commands as words."""
        return [shlex.split(command) for command in self.commands]


@dataclass(frozen=True)
class Table:
    """One file of recipes; see the module."""

    name: str
    document: Mapping[str, Any] = field(repr=False)

    @property
    def title(self) -> str:
        """What it shows."""
        return str(self.document.get("title", ""))

    @property
    def source(self) -> str:
        """Where in which paper it stands."""
        return str(self.document.get("source", ""))

    @property
    def metric(self) -> str:
        """What ``paper`` values are, as ``metrics.json`` calls it."""
        return str(self.document.get("metric", "accuracy"))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know."""
        return tuple(map(str, self.document.get("notes") or ()))

    @property
    def ours(self) -> Mapping[str, str]:
        """What the paper does not say, and why it is as it is."""
        return {str(key): str(value) for key, value in (self.document.get("ours") or {}).items()}

    @property
    def cells(self) -> tuple[str, ...]:
        """The names of all cells, in the file's order."""
        return tuple(self.document["cells"])

    @property
    def small_cells(self) -> tuple[str, ...]:
        """The cells of the miniature; empty if the table has none."""
        if "miniature" not in self.document:
            return ()
        return tuple(self.document["miniature"].get("cells") or self.cells)

    def check(self, cell: str) -> str:
        """The name, if the table has such a cell.

        Raises:
            ConfigError: It has none; names the nearest.
        """
        if cell in self.document["cells"]:
            return cell
        near = difflib.get_close_matches(cell, self.cells, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"accepted: {', '.join(self.cells)}"
        raise ConfigError(f"--cell: {self.name} has no cell {cell!r}; {hint}")

    def paper(self, cell: str) -> dict[str, float]:
        """What the paper reports, by metric; accuracies in per cent. Empty where it gives no number."""
        value = self.document["cells"][self.check(cell)].get("paper")
        if value is None:
            return {}
        return dict(value) if isinstance(value, Mapping) else {self.metric: value}

    def resolve(self, cell: str, *, small: bool = False) -> dict[str, Any]:
        """A cell's flat recipe; with ``small`` that of its miniature.

        Raises:
            ConfigError: There is no such cell, or no miniature.
        """
        entry = self.document["cells"][self.check(cell)]
        values = dict(self.document.get("common") or {})
        for part in entry.get("use", ()):
            values |= self.document["parts"][part]
        values |= {key: value for key, value in entry.items() if key not in _CELL_KEYS}
        values = {key: values[key] for key in _FIRST if key in values} | values
        if not small:
            return values
        miniature = self._miniature()
        names = miniature.get("map") or {}
        values = {k: names.get(v, v) if isinstance(v, str) else v for k, v in values.items()}
        return values | (miniature.get("common") or {})

    def needs(self, values: Mapping[str, Any], *, small: bool = False) -> tuple[Need, ...]:
        """What a recipe of this table needs, each after what it is made from."""
        block = self._miniature() if small else self.document
        entries = {**(block.get("teacher") or {}), **(block.get("data") or {})}
        found: dict[str, Need] = {}
        for key in _PATHS:
            if isinstance(path := values.get(key), str):
                _collect(path, entries, found, ())
        return tuple(found.values())

    def _miniature(self) -> Mapping[str, Any]:
        if "miniature" not in self.document:
            raise ConfigError(f"--scale: {self.name} has no miniature, accepted: full")
        entry: Mapping[str, Any] = self.document["miniature"]
        return entry

    @property
    def small_note(self) -> str:
        """What the miniature has in place of the paper's networks and images."""
        return str(self._miniature().get("note", "")) if "miniature" in self.document else ""

    def former(self, stem: str) -> str | None:
        """The cell that once was a file of this name."""
        before = self.document.get("formerly")
        if isinstance(before, Mapping):
            return before.get(stem)
        if isinstance(before, str) and stem.startswith(before) and stem[len(before) :] in self.cells:
            return stem[len(before) :]
        return None


def recipes_folder() -> Path:
    """Where the recipes are that come with kdfast."""
    try:
        recipes = import_module("kdfast.recipes")  # a folder without code
    except ImportError:  # run from a checkout that nobody installed
        return Path(__file__).resolve().parents[3] / "recipes"
    return Path(next(iter(recipes.__path__)))


def table_names(method: str | None = None) -> list[str]:
    """The tables that come with kdfast, as ``METHOD/NAME``, in natural order; of one method, or of all.

    Raises:
        ConfigError: There are none of this method.
    """
    root = recipes_folder()
    names = [path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*.yaml")]
    names = sorted(names, key=lambda name: [(p.isdigit(), p.zfill(6)) for p in re.split(r"(\d+)", name)])
    if method is None:
        return names
    chosen = [name for name in names if name.partition("/")[0] == method]
    if not chosen:
        known = ", ".join(dict.fromkeys(name.partition("/")[0] for name in names))
        raise ConfigError(f"recipes: got {method!r}, accepted: {known}")
    return chosen


def open_recipe(source: str | Path) -> tuple[str, Mapping[str, Any], str | None]:
    """A recipe's document by file, or by the name of one that comes with kdfast.

    Returns:
        What to call it, what it holds, and the cell, where ``source`` is what one cell was once called.

    Raises:
        ConfigError: There is no such file or name, or it cannot be read.
    """
    path, name = Path(source), _name(source)
    if path.is_file():
        return str(source), _read(path), None
    # Not a path: what is beside the user's feet goes first, then what came with the package.
    known = recipes_folder() / f"{name}.yaml"
    if name and known.is_file():
        return name, _read(known), None
    method, _, stem = name.rpartition("/")
    for table in (
        tables(method) if re.fullmatch(r"\w+", method) and (recipes_folder() / method).is_dir() else ()
    ):
        if (cell := table.former(stem)) is not None:
            return table.name, table.document, cell
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return str(source), _read(path), None  # raises, saying why
    names = table_names()
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "kdfast recipes lists them"
    raise ConfigError(f"recipe {source}: no such file, and no recipe of that name; {hint}")


def load_table(source: str | Path) -> Table:
    """A table by file or name.

    Raises:
        ConfigError: There is none, it is a flat recipe, or something in it is not what a table holds.
    """
    name, document, _ = open_recipe(source)
    if not is_table(document):
        raise ConfigError(f"recipe {name}: got a flat recipe, accepted: a table, which has cells")
    check_table(name, document)
    return Table(name, document)


def tables(method: str | None = None) -> Iterator[Table]:
    """All tables that come with kdfast, or those of one method."""
    for name in table_names(method):
        document = _read(recipes_folder() / f"{name}.yaml")
        if is_table(document):
            yield Table(name, document)


def is_table(document: Any) -> bool:
    """Whether a document is a table, not a flat recipe."""
    return isinstance(document, Mapping) and isinstance(document.get("cells"), Mapping)


def check_table(name: str, document: Mapping[str, Any]) -> None:
    """Refuse what no table holds.

    Raises:
        ConfigError: Naming the key, what it is and what is accepted.
    """

    def refuse(where: str, got: Any, accepted: str) -> None:
        raise ConfigError(f"recipe {name}: {where}: got {shown(got)}, accepted: {accepted}")

    if unknown := [key for key in document if key not in _KEYS]:
        refuse("keys", unknown[0], ", ".join(sorted(_KEYS)))
    for block in ("common", "parts", "ours", "teacher", "data", "miniature"):
        if not isinstance(document.get(block) or {}, Mapping):
            refuse(block, document[block], "keys and values")
    parts = document.get("parts") or {}
    for where, entries in (("parts", parts), ("cells", document["cells"])):
        for key, entry in entries.items():
            if not isinstance(key, str) or not isinstance(entry, Mapping):
                refuse(f"{where}: {key}", entry, "a name with keys and values")
    for key, entry in document["cells"].items():
        used = entry.get("use", [])
        if not isinstance(used, list) or any(part not in parts for part in used):
            refuse(f"cells: {key}: use", used, f"a list of parts ({', '.join(parts) or 'there are none'})")
        value = entry.get("paper")
        numbers = list(value.values()) if isinstance(value, Mapping) else [value]
        if value is not None and not all(type(number) in (int, float) for number in numbers):
            refuse(f"cells: {key}: paper", value, "a number, or numbers by metric")
    small = document.get("miniature") or {}
    if unknown := [key for key in small if key not in _MINIATURE_KEYS]:
        refuse("miniature: keys", unknown[0], ", ".join(sorted(_MINIATURE_KEYS)))
    if wrong := [cell for cell in small.get("cells") or () if cell not in document["cells"]]:
        refuse("miniature: cells", wrong[0], ", ".join(document["cells"]))


def _read(path: Path) -> Mapping[str, Any]:
    require("yaml", extra="train", feature="reading a recipe")
    try:
        text = read_text(path, error=ConfigError, limit=MAX_RECIPE)
    except FileNotFoundError as error:
        raise ConfigError(f"recipe {path}: cannot be read: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"recipe {error}") from error
    document = parse_yaml(text, what=f"recipe {path}")
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigError(f"recipe {path}: got a {type(document).__name__}, accepted: lines of 'key: value'")
    return document


def _name(source: str | Path) -> str:
    """``METHOD/NAME`` of a name, or of the path that a file of the checkout has or had."""
    words = Path(source).with_suffix("") if Path(source).suffix in (".yaml", ".yml") else Path(source)
    parts = words.parts
    if "recipes" in parts:
        parts = parts[len(parts) - 1 - parts[::-1].index("recipes") + 1 :]
    return "/".join(parts)


def _collect(path: str, entries: Mapping[str, Any], found: dict[str, Need], above: Sequence[str]) -> None:
    """Add what makes a path, after what that is made from."""
    if path in found or path in above or (match := _match(path, entries)) is None:
        return
    entry, names = match
    if isinstance(entry, Mapping):
        found[path] = Need(path, bring=str(entry.get("bring", "")))
        return
    commands = tuple(
        _filled(str(command), names) for command in ([entry] if isinstance(entry, str) else entry)
    )
    for command in commands:
        for word in shlex.split(command):
            for part in (word, word.partition("=")[2]):
                if part and part != path:
                    _collect(part, entries, found, (*above, path))
    found[path] = Need(path, commands)


def _match(path: str, entries: Mapping[str, Any]) -> tuple[Any, dict[str, str]] | None:
    if path in entries:
        return entries[path], {}
    for pattern, entry in entries.items():
        if "{" in pattern:
            expression = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(pattern))
            if found := re.fullmatch(expression, path):
                return entry, found.groupdict()
    return None


def _filled(command: str, names: Mapping[str, str]) -> str:
    for name, value in names.items():
        command = command.replace(f"{{{name}}}", value)
    return command
