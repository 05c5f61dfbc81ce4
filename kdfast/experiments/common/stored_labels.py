"""A teacher's outputs for a set of images, as ``kdfast label`` writes them and students learn from them.

Two files: ``teacher-labels.json`` says whose outputs, of which images and of which views, and what feeds the teacher;
``teacher-labels.safetensors`` holds them, float16, by the images' numbers: ``logits`` ``[N, V, C]``, or of the k
largest ``indices``, ``log_probs`` ``[N, V, k]`` and ``log_tail`` ``[N, V]`` (:class:`~kdfast.functional.TopKTeacher`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.documents import Fields, read_json, shown
from kdfast.errors import CheckpointError, require
from kdfast.functional import TopKTeacher, crop_flip_normalize
from kdfast.training import files
from kdfast.training.checkpoint import read_tensors
from kdfast.training.model_io import ModelConfig, config_of
from kdfast.version import __version__

HEADER, TENSORS = "teacher-labels.json", "teacher-labels.safetensors"
FORMAT, VERSION = "kdfast-labels", 1
PADDING = 4
_MOST = 1 << 31
_LEAST = -60.0  # of a logarithm of mass

#: Top and left of each image's crop, int32 ``[N, 2]``, and whether it is mirrored, bool ``[N]``.
Draws = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Views:
    """The augmented views of a set's images: each drawn once, by its number, whoever looks at it and in which batch.

    Attributes:
        count: V, how many of each image.
        augment: ``crop``, ``flip``; nothing leaves images as they are.
        seed: Of the draws.
    """

    count: int
    augment: Sequence[str]
    seed: int

    def draws(self, images: int, view: int) -> Draws:
        """The draws of one view of so many images, on the CPU; a larger set begins with a smaller one's."""
        padding = PADDING if "crop" in self.augment else 0
        # Image by image from one stream: top, left, mirrored.
        drawn = torch.from_numpy(np.random.default_rng([self.seed, view]).random((images, 3)))
        offsets = (drawn[:, :2] * (2 * padding + 1)).to(torch.int32)
        return offsets, (drawn[:, 2] < 0.5) & ("flip" in self.augment)

    def apply(self, images: Tensor, draws: Draws, rows: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` in [0, 1] with the draws of these rows."""
        if not self.augment:
            return images
        offsets, flips = (part[rows].to(images.device, non_blocking=True) for part in draws)
        return crop_flip_normalize(images, offsets, flips, padding=PADDING if "crop" in self.augment else 0)


def as_tensors(logits: Tensor, top_k: int | None, temperature: float) -> dict[str, Tensor]:
    """What is kept of logits float16 ``[N, V, C]``."""
    if top_k is None:
        return {"logits": logits}
    kept = TopKTeacher.compress(logits, top_k, temperature=temperature)
    return {name: getattr(kept, name) for name in ("indices", "log_probs", "log_tail")}


def write_labels(folder: Path, header: Mapping[str, Any], tensors: dict[str, Tensor]) -> int:
    """Write both files, the header last: it says that the labels are whole.

    Returns:
        Bytes on disk.

    Raises:
        CheckpointError: The disk is full or failing.
    """
    serialize = require("safetensors.torch", extra="train", feature="storing labels").save
    data = serialize({name: tensor.contiguous() for name, tensor in tensors.items()})
    files.write_file(folder / TENSORS, data)
    files.write_json(folder / HEADER, {"format": FORMAT, "version": VERSION, "kdfast": __version__, **header})
    return len(data) + (folder / HEADER).stat().st_size


class StoredLabels:
    """Labels that were read.

    Args:
        folder: Where :func:`write_labels` put them.

    Attributes:
        teacher: How the teacher was named.
        teacher_parameters: How many it has.
        data: How the images were named.
        images: N.
        contents: What tells the images from any others.
        described: What the teacher is, and what feeds it.
        image_size: Side that it saw.
        views: The views of each image.

    Raises:
        CheckpointError: There are none, or they are damaged; the message names the file and the field.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        place = self.folder / HEADER
        try:
            document = read_json(place, error=CheckpointError)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.folder}: holds no {HEADER}; kdfast label DATA TEACHER --out {self.folder} writes a teacher's "
                "outputs there"
            ) from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CheckpointError(f"{place}: is not the header of kdfast's labels")
        if document.get("version") != VERSION:
            raise CheckpointError(
                f"{place}: has version {shown(document.get('version'))}; this kdfast reads version {VERSION}"
            )
        entry = Fields(document, place, CheckpointError)
        self.teacher, self.data, self.contents = (
            entry.text(name) for name in ("teacher", "data", "contents")
        )
        self.teacher_parameters = entry.integer("teacher_parameters", 0, 1 << 60)
        self.images = entry.integer("images", 1, _MOST)
        self.described: ModelConfig = config_of(entry.mapping("network"), f"{place}: network")
        self.image_size = entry.integer("image_size", 1, _MOST)
        self.views = Views(
            entry.integer("views", 1, 1 << 16), entry.texts("augment"), entry.integer("seed", 0)
        )
        if unknown := sorted(set(self.views.augment) - {"crop", "flip"}):
            entry.refuse("augment", f"crop, flip, not {unknown[0]}")
        self.top_k = entry.optional("top_k", lambda name: entry.integer(name, 1, self.described.num_classes))
        self.temperature = entry.number("temperature")
        if self.temperature <= 0:
            entry.refuse("temperature", "a number above 0")

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        path = self.folder / TENSORS
        found = read_tensors(path)
        rows = (self.images, self.views.count)
        wanted: dict[str, tuple[int, ...]] = {"logits": (*rows, self.described.num_classes)}
        if self.top_k is not None:
            wanted = {"indices": (*rows, self.top_k), "log_probs": (*rows, self.top_k), "log_tail": rows}
        given = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if given != wanted:
            raise CheckpointError(f"{path}: holds {given}, expected {wanted}, as {HEADER} beside it says")
        return found

    def outputs(self, rows: Tensor, view: Tensor) -> Tensor:
        """The teacher's logits, float32 ``[B, C]``, on the CPU.

        Of the k largest outputs the rest of the mass is shared evenly among the other classes.

        Args:
            rows: Numbers of images, int64 ``[B]``, on the CPU.
            view: Which view of each, int64 ``[B]``.
        """
        tensors = {name: tensor[rows, view] for name, tensor in self._tensors.items()}
        classes = self.described.num_classes
        if self.top_k is None:
            return tensors["logits"].float()
        kept = TopKTeacher(**tensors, temperature=self.temperature, num_classes=classes)
        indices, logits, _ = kept.read()
        # A tail without any mass would be a logit of -inf, of which a class's share cannot be told from rounding.
        share = kept.log_tail.float().clamp_min(_LEAST) - math.log(max(classes - self.top_k, 1))
        tail = share * self.temperature
        return tail[:, None].expand(-1, classes).scatter(1, indices, logits)

    def seen(self, images: Tensor, rows: Tensor, view: Tensor) -> Tensor:
        """The images ``[B, C, H, W]`` in [0, 1] as the teacher saw them in these views."""
        if not self.views.augment:
            return images
        offsets, flips = (part[rows, view] for part in self._draws)
        return self.views.apply(images, (offsets, flips), torch.arange(len(rows)))

    @cached_property
    def _draws(self) -> Draws:
        """Of all views: ``[N, V, 2]`` and ``[N, V]``."""
        each = [self.views.draws(self.images, view) for view in range(self.views.count)]
        return torch.stack([offsets for offsets, _ in each], 1), torch.stack([flips for _, flips in each], 1)
