"""How large a shard's images are, kept beside it so that the next run need not look into each again.

Only that is kept, and only as an answer to a question about bytes whose checksum is known: labels, names and places
are read from the shard every time. The file lies in the data's folder, where anyone may have written, so it carries a
digest of its own; what does not match is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from kdfast.data.codec import MAX_PIXELS, measure
from kdfast.disk import TEMPORARY, write_atomic
from kdfast.documents import Fields, read_json
from kdfast.errors import ShardError

CACHE = ".preflight"
# Raised whenever what is said of an image could change for the same bytes.
_VERSION = 2
_STALE = 3600  # seconds after which an unfinished file is one of a process that died

#: ``"OFFSET+SIZE"`` of an image to its height and width, or to what is wrong with it.
_Found = dict[str, "tuple[int, int] | str"]


class Measures:
    """The measures of one shard's images.

    Args:
        folder: Of the shards.
        checksum: SHA-256 of the shard's bytes, in hexadecimal.
    """

    def __init__(self, folder: Path, checksum: str) -> None:
        self._path, self._checksum = folder / CACHE / f"{checksum}.json", checksum
        self._known: _Found = self._load()
        self._asked: _Found = {}

    def of(self, offset: int, size: int, read: Callable[[], bytes]) -> tuple[int, int]:
        """Height and width of the image there.

        Raises:
            ValueError: It is none, or is damaged; see :func:`~kdfast.data.codec.measure`.
        """
        place = f"{offset}+{size}"
        answer = self._known.get(place)
        if answer is None:
            try:
                answer = measure(read())
            except ValueError as error:
                answer = str(error)
        self._asked[place] = answer
        if isinstance(answer, str):
            raise ValueError(answer)
        return answer

    def keep(self) -> None:
        """Write down what was asked, if it is not what was written already and the folder takes it."""
        if self._asked == self._known:
            return
        # A read-only folder is measured again each time; so is a full disk.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            _sweep(self._path.parent)
            document = {
                "version": _VERSION,
                "digest": _digest(self._checksum, self._asked),
                "images": self._asked,
            }
            write_atomic(self._path, json.dumps(document, separators=(",", ":")).encode())

    def _load(self) -> _Found:
        """What an earlier run wrote; nothing if it is not exactly that."""
        try:
            document = Fields(read_json(self._path, error=ShardError), self._path, ShardError)
            if document.integer("version", 0) != _VERSION:
                return {}
            found = {place: _answer(entry) for place, entry in document.mapping("images").items()}
            return found if document.text("digest") == _digest(self._checksum, found) else {}
        except (OSError, ShardError, ValueError):
            return {}


def _answer(entry: object) -> tuple[int, int] | str:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, list) and len(entry) == 2 and all(type(side) is int and side > 0 for side in entry):
        height, width = entry
        if height * width <= MAX_PIXELS:
            return height, width
    raise ValueError("is no measure")


def _digest(checksum: str, found: _Found) -> str:
    text = json.dumps([checksum, _VERSION, found], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - os.stat(path).st_mtime > _STALE:
                path.unlink()
