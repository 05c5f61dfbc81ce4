"""Names of splits: which part of a set a word means, however it is spelled."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

#: What a split may be called in a folder, a 🤗 data set or a request; in any case of letters.
ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
SPLITS = (*ALIASES, "all")
SplitName = Literal["train", "val", "test", "all"]

#: What is looked for, best first: a set without a test split is measured on its validation split, and the reverse.
_STANDS_IN = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}


def split_name(given: str) -> str:
    """One of :data:`SPLITS` for any of their spellings.

    Raises:
        ValueError: It is none.
    """
    word = given.lower() if isinstance(given, str) else given
    for name, spelled in ALIASES.items():
        if word in spelled:
            return name
    if word == "all":
        return "all"
    raise ValueError(f"split is one of {', '.join(SPLITS)}, got {given!r}")


def is_split(name: str) -> bool:
    """Whether a folder's or a table's name is that of a split."""
    return any(name.lower() in spelled for spelled in ALIASES.values())


def choose(split: str, found: Collection[str]) -> str | None:
    """Which of the splits that a set has answers a request for ``split``; ``None`` if none does."""
    return next((name for name in _STANDS_IN[split] if name in found), None)


def held_out_note(source: str, split: str, kept: int, total: int) -> str:
    """What a user is told about a set that was split because somebody asked for a split that it does not have."""
    return f"{source} has no split folders or tables: {split} is {kept} of its {total} images"
