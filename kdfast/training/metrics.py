"""``metrics.jsonl``: one JSON object a line, which plots and reports read; mirrored to TensorBoard.

{"kind": "train", "step": 50, "epoch": 1, "loss": 0.71, "lr": 0.05, "images_per_second": 5120.0, "seconds": 1.2}
{"kind": "eval", "step": 100, "epoch": 1, "seconds": 2.0, "accuracy": 0.91, "top5_accuracy": 0.99}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdfast.documents import Fields, read_json_lines
from kdfast.errors import DataError, require
from kdfast.training import files


class MetricsLog:
    """Appends to ``metrics.jsonl``, and to TensorBoard if asked.

    Args:
        path: The file. Made if missing.
        resume_step: Keep lines up to this step and drop the rest, which a resumed run writes again; ``None``
            starts an empty log.
        tensorboard: Directory for TensorBoard's event files, or ``None``.
    """

    def __init__(
        self, path: Path, *, resume_step: int | None = None, tensorboard: Path | None = None
    ) -> None:
        self._path = path
        kept = "" if resume_step is None else _until(path, resume_step)
        files.write_file(path, kept)
        self._handle = open(path, "a")  # noqa: SIM115 — lives as long as the run
        self._board: Any = None
        if tensorboard is not None:
            writer = require(
                "torch.utils.tensorboard", extra="train", feature="the TensorBoard log"
            ).SummaryWriter
            self._board = writer(
                str(tensorboard), purge_step=None if resume_step is None else resume_step + 1
            )

    def write(self, kind: str, step: int, **values: float) -> None:
        """Add a line of this ``kind`` (``"train"`` or ``"eval"``)."""
        with files.reporting_disk(self._path):
            self._handle.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._handle.flush()
            if self._board is not None:
                for name, value in values.items():
                    if name not in ("epoch", "seconds"):
                        self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both logs."""
        self._handle.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, in order. A last line that a crash cut short is left out.

    Raises:
        DataError: The file cannot be read, or a line before the last is no JSON object.
    """
    try:
        return read_json_lines(path, error=DataError)
    except FileNotFoundError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _until(path: Path, step: int) -> str:
    if not path.exists():
        return ""
    entries = [(Fields(entry, f"{path}: a line", DataError), entry) for entry in read_metrics(path)]
    return "".join(json.dumps(entry) + "\n" for fields, entry in entries if fields.integer("step", 0) <= step)
