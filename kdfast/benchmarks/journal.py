"""Rows that outlive their process: one JSON line each, on disk before the next one is begun.

Several processes may append to one file. A line that a kill cut short is skipped when the file is read, and closed
off when the next one is written, so that it costs itself and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast.documents import parse_json, read_regular
from kdfast.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: one process at a time, then
    fcntl = None  # type: ignore[assignment]


#: Bytes of a journal; a campaign writes some megabytes.
MOST = 1 << 30


class Journal:
    """A file of records, which only grows.

    Args:
        path: Made, with its folder, when the first record is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; it is on disk when this returns."""
        line = json.dumps(record).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)  # whoever is killed lets go of it
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:
                line = line[os.write(handle, line) :]
            os.fsync(handle)
        finally:
            os.close(handle)

    def records(self) -> list[dict[str, Any]]:
        """All whole records, oldest first; none where there is no file yet."""
        try:
            lines = read_regular(self.path, limit=MOST).decode(errors="replace").split("\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        found = []
        for line in lines:
            try:
                record = parse_json(line, what="a line", error=ConfigError)
            except ConfigError:  # cut short
                continue
            if isinstance(record, dict):
                found.append(record)
        return found


def replace(path: Path, text: str) -> None:
    """Write a file anew such that whoever looks, and whatever is killed, finds the old one or the new one whole."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with fresh.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    fresh.replace(path)
