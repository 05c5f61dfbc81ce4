"""What ``kdfast eval`` is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdfast.data.splits import SplitName
from kdfast.experiments.common.bounds import Count
from kdfast.experiments.common.networks import TeacherKeys


@dataclass(frozen=True)
class EvalConfig(TeacherKeys):
    """What to measure on what.

    Attributes:
        checkpoint: Directory of a finished run, its ``model.safetensors``, ``timm:NAME``, ``torchvision:NAME``,
            ``hf:NAME``, or ``FILE.py:FACTORY`` with ``weights``.
        data: ``digits``, a folder of images, ``hf:NAME``, a directory of shards, or a folder of ``images/`` and
            ``masks/`` (see :mod:`kdfast.data.segmentation`).
        split: ``train``, ``val``, ``test`` or ``all``; by default the test split, or all of a folder without splits.
            Shards have no splits.
        batch_size: Images a batch.
        device: ``auto`` takes the GPU if there is one.
        loader: For shards: ``dali`` or ``torch``.
        image_size: Side of the images; by default the network's.
        out: Keep the result in this directory, for ``kdfast report``.
    """

    checkpoint: str
    data: str
    split: SplitName | None = None
    batch_size: int = 256
    device: Literal["auto", "cpu", "cuda"] = "auto"
    loader: Literal["dali", "torch"] = "dali"
    image_size: Count | None = None
    out: str | None = None
