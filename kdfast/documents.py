"""Small files that others may have written: read within bounds, and checked field by field.

A manifest, a config, a checkpoint's listing or a recipe comes with somebody's data, and whoever edits one by hand makes
mistakes. So every such file goes through here: it must be a regular file (no pipe, no device) of a bounded size, its
nesting and the number of its containers are bounded before anything walks over it, no key comes twice, and
:class:`Fields` says of every value where it stands, what it is, and what is accepted.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from kdfast.errors import KDFastError

#: Bounds of any JSON document: a manifest of ten thousand shards of ImageNet has half of these bytes.
MAX_BYTES = 64 << 20
#: A list or object takes 56 bytes or more in memory, and two in the file.
MAX_CONTAINERS = 4 << 20
MAX_DEPTH = 64

_Raise = type[KDFastError]
T = TypeVar("T")

_shortened = reprlib.Repr()
_shortened.maxlevel, _shortened.maxstring, _shortened.maxother, _shortened.maxlong = 3, 100, 100, 40


def shown(value: Any) -> str:
    """A value as a message quotes it: never longer than a line, however large the value."""
    try:
        text = _shortened.repr(value)
    except ValueError:  # an integer of more digits than Python is willing to print
        text = f"<{type(value).__name__} of many digits>"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:197] + "..."


def read_regular(path: str | os.PathLike[str], *, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read, is no regular file (opening a pipe would wait for ever), or has more than ``limit``
            bytes.
    """
    # Not blocking: opening a named pipe to read waits for a writer otherwise.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise OSError(f"is {_kind(facts.st_mode)}, not a file")
    with open(descriptor, "rb") as stream:
        if facts.st_size > limit:
            raise OSError(f"has {facts.st_size} bytes, accepted: at most {limit}")
        # Not more than was measured: the file may grow, or (in /proc) say that it has none.
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise OSError(f"has more than {limit} bytes")
    return data


def read_text(path: str | os.PathLike[str], *, error: _Raise, limit: int = MAX_BYTES) -> str:
    """The text of a regular UTF-8 file.

    Raises:
        FileNotFoundError: There is none.
        KDFastError: As ``error``: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        return read_regular(path, limit=limit).decode("utf-8-sig")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem


def read_json(path: str | os.PathLike[str], *, error: _Raise, limit: int = MAX_BYTES) -> Any:
    """Read a JSON document within the bounds of this module.

    Raises:
        FileNotFoundError: There is none.
        KDFastError: As ``error``, naming the file: it cannot be read, or :func:`parse_json` refuses it.
    """
    return parse_json(read_text(path, error=error, limit=limit), what=str(path), error=error)


def parse_json(text: str, *, what: str, error: _Raise) -> Any:
    """A JSON document from its text.

    Args:
        text: The document.
        what: What to call it in messages.
        error: What to raise.

    Raises:
        KDFastError: As ``error``: it is not JSON, is nested deeper than :data:`MAX_DEPTH`, has too many lists and
            objects, holds a key twice, or text that is no Unicode.
    """
    if text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise error(f"{what}: has more than {MAX_CONTAINERS} lists and objects")
    try:
        document = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise error(f"{what}: is nested too deep, accepted: {MAX_DEPTH} levels") from None
    except ValueError as problem:
        raise error(f"{what}: cannot be read as JSON: {problem}") from problem
    if _deeper(document, MAX_DEPTH):
        raise error(f"{what}: is nested too deep, accepted: {MAX_DEPTH} levels")
    if "\\u" in text:
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise error(f"{what}: holds half of a character (a lone surrogate)") from None
    return document


def read_json_lines(
    path: str | os.PathLike[str], *, error: _Raise, limit: int = MAX_BYTES
) -> list[dict[str, Any]]:
    """The objects of a file that has one a line, in order; a last line that a crash cut short is left out.

    Raises:
        FileNotFoundError: There is none.
        KDFastError: As ``error``, naming the file and the line: it cannot be read, or holds something else.
    """
    lines = read_text(path, error=error, limit=limit).splitlines()
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line, what=f"line {number}", error=error)
        except KDFastError as problem:
            if number == len(lines):
                break
            why = str(problem).removeprefix(f"line {number}: ").removeprefix("cannot be read as JSON: ")
            raise error(f"{path}: line {number} is not JSON: {why}") from problem
        if not isinstance(entry, dict):
            raise error(f"{path}: line {number}: holds {shown(entry)}, accepted: an object")
        entries.append(entry)
    return entries


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} comes twice")
    return made


def _deeper(document: Any, limit: int) -> bool:
    level = [document]
    for _ in range(limit + 1):
        level = [
            entry
            for container in level
            if isinstance(container, (dict, list))
            for entry in (container.values() if isinstance(container, dict) else container)
            if isinstance(entry, (dict, list))
        ]
        if not level:
            return False
    return True


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return name
    return "something else"


class Fields:
    """The values of an object that was read, each checked as it is taken.

    Args:
        document: What was read; anything but an object is refused.
        where: The file, and the place in it, for messages.
        error: What to raise.

    Example:
        >>> from kdfast.errors import ShardError
        >>> Fields({"samples": 3}, "manifest.json", ShardError).integer("samples", 0)
        3
    """

    def __init__(self, document: Any, where: str | Path, error: _Raise) -> None:
        self._where, self._error = str(where), error
        if not isinstance(document, dict):
            raise error(f"{where}: holds {shown(document)}, accepted: an object")
        self._values: Mapping[str, Any] = document

    def __str__(self) -> str:
        return self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def refuse(self, name: str, accepted: str) -> NoReturn:
        """Raise: the field is not what is accepted."""
        got = shown(self._values[name]) if name in self._values else "nothing"
        raise self._error(f"{self._where}: {name}: got {got}, accepted: {accepted}")

    def only(self, known: Sequence[str]) -> None:
        """Refuse fields that are not ``known``."""
        if unknown := sorted(self._values.keys() - set(known)):
            raise self._error(
                f"{self._where}: has unknown keys {shown(', '.join(unknown))}, accepted: {', '.join(known)}"
            )

    def need(self, *names: str) -> None:
        """Refuse to go on without these fields."""
        if missing := [name for name in names if name not in self._values]:
            raise self._error(f"{self._where}: lacks {', '.join(missing)}")

    def raw(self, name: str) -> Any:
        """The value, unchecked; it must be there."""
        self.need(name)
        return self._values[name]

    def optional(self, name: str, take: Callable[[str], T]) -> T | None:
        """What ``take`` says of the field, or ``None`` where it is absent or null."""
        return None if self._values.get(name) is None else take(name)

    def integer(self, name: str, low: int, high: int = 2**63 - 1) -> int:
        """A whole number in [low, high]."""
        value = self.raw(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            top = f" to {high}" if high < 2**63 - 1 else " or more"
            self.refuse(name, f"a whole number, {low}{top}")
        return value

    def integers(self, name: str, low: int, high: int) -> list[int]:
        """A list of whole numbers in [low, high]."""
        value = self.raw(name)
        if not isinstance(value, (list, tuple)) or not all(
            type(entry) is int and low <= entry <= high for entry in value
        ):
            self.refuse(name, f"a list of whole numbers, {low} to {high}")
        return list(value)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.raw(name)
        if not _finite(value):
            self.refuse(name, "a finite number")
        return float(value)

    def numbers(self, name: str, *, positive: bool = False) -> tuple[float, ...]:
        """A list of at least one finite number, all above 0 if ``positive``."""
        value = self.raw(name)
        kind = "numbers above 0" if positive else "finite numbers"
        if not isinstance(value, list) or not value or not all(map(_finite, value)):
            self.refuse(name, f"a list of {kind}")
        if positive and not all(entry > 0 for entry in value):
            self.refuse(name, f"a list of {kind}")
        return tuple(float(entry) for entry in value)

    def boolean(self, name: str) -> bool:
        """True or false."""
        value = self.raw(name)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def text(self, name: str, pattern: str | None = None, accepted: str = "text") -> str:
        """Text, all of it matched by ``pattern`` if there is one, without NUL."""
        value = self.raw(name)
        if not isinstance(value, str) or "\0" in value:
            self.refuse(name, accepted)
        if pattern is not None and not re.fullmatch(pattern, value):
            self.refuse(name, accepted)
        return value

    def choice(self, name: str, *accepted: str) -> str:
        """One of the texts ``accepted``."""
        value = self.raw(name)
        if not isinstance(value, str) or value not in accepted:
            self.refuse(name, ", ".join(map(repr, accepted)))
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        value = self.raw(name)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            self.refuse(name, "a list of texts")
        return tuple(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object."""
        value = self.raw(name)
        if not isinstance(value, dict):
            self.refuse(name, "an object")
        return value

    def entries(self, name: str) -> list[Any]:
        """A list of anything."""
        value = self.raw(name)
        if not isinstance(value, list):
            self.refuse(name, "a list")
        return value


def _finite(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False
