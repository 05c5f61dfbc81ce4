"""What is written beside the shards, a JSON object a line: refused draws, and a scorer's numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdfast.disk import write_atomic
from kdfast.documents import Fields, read_json_lines
from kdfast.errors import DataError

REFUSED = "refused.jsonl"
SCORES = "scores.jsonl"


def note(path: Path, entries: list[dict[str, Any]]) -> None:
    """Add lines; those that are there already, of a batch made again after a crash, are not counted twice."""
    present = noted(path)
    fresh = [entry for entry in entries if entry not in present]
    with open(path, "a") as handle:
        handle.writelines(json.dumps(entry) + "\n" for entry in fresh)


def noted(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none if it is missing, without one that a crash cut off."""
    try:
        return read_json_lines(path, error=DataError)
    except FileNotFoundError:
        return []


class Scores:
    """The numbers that a scorer gave, kept in ``scores.jsonl`` in the order of the images.

    Args:
        folder: Of the shards.
        scorer: See :meth:`kdfast.diffusion.Synthesizer.write`.
        begun: Images that are on disk already; later lines are those of a run that was stopped, and are dropped.
    """

    def __init__(self, folder: Path, scorer: Callable[[torch.Tensor, torch.Tensor], Any], begun: int) -> None:
        self._path, self._scorer, self._next = folder / SCORES, scorer, begun
        lines = noted(self._path)
        numbers = [Fields(entry, f"{self._path}: a line", DataError).integer("image", 0) for entry in lines]
        kept = [entry for number, entry in zip(numbers, lines) if number < begun]
        write_atomic(self._path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def add(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Score a batch.

        Raises:
            DataError: Not one finite number an image.
        """
        values = torch.as_tensor(self._scorer(images, labels), dtype=torch.float64).flatten().tolist()
        if len(values) != len(labels) or not all(map(math.isfinite, values)):
            shown = f"{len(values)} numbers" if len(values) != len(labels) else "a value that is not finite"
            raise DataError(f"scorer: gave {shown} for {len(labels)} images, expected one finite number each")
        with open(self._path, "a") as handle:
            for label, value in zip(labels.tolist(), values):
                handle.write(json.dumps({"image": self._next, "class": label, "score": value}) + "\n")
                self._next += 1
