"""One list of class names in terms of another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdfast.errors import DataError

#: A class that no image is of; in masks a pixel that does not count.
NOWHERE = 255
_SHOWN = 12


def class_mapping(
    theirs: Sequence[str], ours: Sequence[str], used: set[int], source: str
) -> NDArray[np.int64]:
    """Our number of each of their classes, int64; :data:`NOWHERE` for those that no image is of.

    Raises:
        DataError: A class that is used is not among ours.
    """
    if len(set(theirs)) < len(theirs) or len(set(ours)) < len(ours):
        raise DataError(f"{source}: two classes have one name, so they cannot be matched by name")
    numbers = {name: number for number, name in enumerate(ours)}
    if strange := [theirs[label] for label in sorted(used) if theirs[label] not in numbers]:
        raise DataError(
            f"{source}: class {strange[0]!r} is not one of the network's. It has {_listed(theirs)}; the network has "
            f"{_listed(ours)}. Folders or labels are matched by name: rename them"
        )
    return np.array([numbers.get(name, NOWHERE) for name in theirs], dtype=np.int64)


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return "[" + ", ".join(map(repr, names[:_SHOWN])) + more + "]"
