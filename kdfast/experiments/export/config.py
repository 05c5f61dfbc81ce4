"""What ``kdfast export`` is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Of networks; of what an SSD-KD run inverted; of sets of images.
Format = Literal["safetensors", "torchscript", "torch.export", "onnx", "shards", "folder", "webdataset"]
IMAGES = ("folder", "webdataset")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which network becomes which file, or which set of shards files for others to read.

    Attributes:
        run: Directory of a finished run, or any network that ``teacher`` of a recipe can name; or of a set of shards.
        to: ``safetensors`` (weights alone), ``torchscript``, ``torch.export`` or ``onnx``; ``shards``: the images that
            an SSD-KD run inverted, as a labelled set; of a set of shards ``folder``, a sub-folder a class, or
            ``webdataset``, tars of ``.jpg`` and ``.cls``.
        weights: ``last``, or ``best``, the epoch that measured best.
        out: Directory for the files; by default ``export`` in the run's own, of ``shards`` that.
    """

    run: str
    to: Format
    weights: Literal["last", "best"] = "last"
    out: str | None = None
