"""What ``kdfast export`` is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["safetensors", "torchscript", "torch.export", "onnx", "shards"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which network becomes which file.

    Attributes:
        run: Directory of a finished run, or any network that ``teacher`` of a recipe can name.
        to: ``safetensors`` (weights alone), ``torchscript``, ``torch.export`` or ``onnx``; ``shards``: the images that
            an SSD-KD run inverted, as a labelled set.
        weights: ``last``, or ``best``, the epoch that measured best.
        out: Directory for the files; by default ``export`` in the run's own, of ``shards`` that.
    """

    run: str
    to: Format
    weights: Literal["last", "best"] = "last"
    out: str | None = None
