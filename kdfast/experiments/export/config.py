"""What ``kdfast export`` is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["safetensors", "torchscript", "torch.export", "onnx"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which network becomes which file.

    Attributes:
        run: Directory of a finished run, or any network that ``teacher`` of a recipe can name.
        to: ``safetensors`` (weights alone), ``torchscript``, ``torch.export`` or ``onnx``.
        weights: ``last``, or ``best``, the epoch that measured best.
        out: Directory for the files; by default ``export`` in the run's own.
    """

    run: str
    to: Format
    weights: Literal["last", "best"] = "last"
    out: str | None = None
