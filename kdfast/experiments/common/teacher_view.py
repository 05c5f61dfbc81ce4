"""A set of images as a teacher sees it: predictions, confidences, features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdfast.data.augment import mixup
from kdfast.data.datasets import load_dataset
from kdfast.data.manifest import is_shard_folder, read_manifest
from kdfast.data.records import ImageRecords, LabelledRecords, ShardRecords
from kdfast.data.regimes import regime
from kdfast.data.selection import relative_entropy
from kdfast.data.splits import SplitName
from kdfast.errors import DataError
from kdfast.experiments.common.bounds import Count, Seed
from kdfast.experiments.common.networks import TeacherKeys, load_teacher
from kdfast.training.model_io import ModelConfig
from kdfast.training.progress import Progress

Advance = Callable[[int], None]
Each = Callable[[torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class ViewRecipe(TeacherKeys):
    """The part of a recipe that says what a teacher looks at, and how.

    Attributes:
        data: A directory of shards, or real labelled images: ``digits``, a folder, ``hf:NAME``.
        teacher: Directory of a trained network, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``, or
            ``FILE.py:FACTORY``.
        split: Of labelled images: ``train``, ``val``, ``test`` or ``all``; by default the train split, or all of a
            folder without splits.
        label_column: Which class column to use, where ``hf:`` data has several.
        seed: Of the draws.
        batch_size: Images the teacher sees at a time.
        device: ``auto`` takes the GPU if there is one.
        loader: For shards: ``dali``, or ``torch`` for the plain loader.
        on_error: ``raise`` at a damaged image, or ``skip`` it.
        progress: Show a progress bar.
    """

    data: str
    teacher: str
    split: SplitName | None = None
    label_column: str | None = None
    seed: Seed = 0
    batch_size: Count = 256
    device: Literal["auto", "cpu", "cuda"] = "auto"
    loader: Literal["dali", "torch"] = "dali"
    on_error: Literal["raise", "skip"] = "raise"
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class LookRecipe(ViewRecipe):
    """The same where it looks at augmented images too.

    Attributes:
        out: Directory of the results.
        regime: Augmentation whose effect on the teacher's predictions is measured.
    """

    out: str
    regime: Literal["none", "standard", "high", "extreme"] = "high"


class Teacher:
    """A trained network that takes images in [0, 1].

    Args:
        network: In evaluation mode here, without gradients of its own.
        described: What it was trained on.
        device: Where it runs.
        name: What to call it.
    """

    def __init__(self, network: nn.Module, described: ModelConfig, device: torch.device, name: str) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.described, self.device, self.name = described, device, name
        self.num_classes = described.num_classes
        self._mean, self._std = (
            torch.tensor(values, device=device).view(-1, 1, 1) for values in (described.mean, described.std)
        )

    @classmethod
    def load(
        cls,
        path: str,
        device: torch.device,
        keys: TeacherKeys | None = None,
        *,
        image_size: int | None = None,
    ) -> Teacher:
        """The network that a command names, as :func:`load_teacher` reads it.

        Raises:
            CheckpointError: It cannot be read.
            ConfigError: There is none of this name, or what it needs was not said.
        """
        network, described = load_teacher(path, keys, image_size=image_size)
        return cls(network, described, device, Path(path).resolve().name if Path(path).exists() else path)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C]`` of images ``[B, 3, H, W]`` in [0, 1]."""
        logits: torch.Tensor = self.network((images - self._mean) / self._std)
        return logits

    @torch.no_grad()
    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled features ``[B, D]`` and logits; of a network that does not tell its features, logits for both."""
        if not hasattr(self.network, "forward_head"):
            logits = self(images)
            return logits, logits
        network: Any = self.network
        features = network.forward_features((images - self._mean) / self._std)
        pooled: torch.Tensor = network.forward_head(features, pre_logits=True)
        return pooled.flatten(1), network.forward_head(features)

    def fingerprint(self) -> str:
        """Of its weights, to tell whether results belong to it."""
        digest = hashlib.sha256()
        for name, value in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class View:
    """What a teacher says of N images; rows of images that could not be decoded are left out.

    Attributes:
        index: int64 ``[N]``, the images' numbers in their set.
        first: int64 ``[N]``, predicted class.
        second: int64 ``[N]``, the runner-up.
        confidence: ``[N]``, softmax of the predicted class.
        margin: ``[N]``, its distance to the runner-up's.
        features: float32 ``[N, D]``, pooled, or ``[N, 0]`` if nobody asked.
    """

    index: NDArray[np.int64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    confidence: NDArray[np.float32]
    margin: NDArray[np.float32]
    features: NDArray[np.float32]


def open_images(
    config: ViewRecipe, *, image_size: int, device: torch.device
) -> ShardRecords | LabelledRecords:
    """The images of ``config.data``: shards, or real labelled images.

    Raises:
        DataError: They cannot be used.
    """
    data = config.data
    folder = Path(data)
    if is_shard_folder(data) or (folder.is_dir() and any(folder.glob("*.tar"))):
        records = ShardRecords(
            data, image_size=image_size, device=device, loader=config.loader, on_error=config.on_error
        )
        if is_shard_folder(data):
            names = read_manifest(data).metadata.get("classes")
            # Whoever wrote the set may have meant something else by the word.
            records.classes = tuple(map(str, names)) if isinstance(names, list) else ()
        return records
    dataset = load_dataset(data, config.split, image_size=image_size, label_column=config.label_column)
    return LabelledRecords(dataset, device)


@torch.no_grad()
def view(
    teacher: Teacher,
    images: ImageRecords,
    indices: NDArray[np.int64] | None = None,
    *,
    batch_size: int = 256,
    features: bool = False,
    each: Each = lambda images: None,
    advance: Advance = lambda count: None,
) -> View:
    """Show the teacher images, all or these; ``each`` sees every batch too.

    Raises:
        DataError: None of them can be decoded.
    """
    chosen = np.arange(len(images.labels)) if indices is None else indices
    parts: list[tuple[NDArray[np.generic], ...]] = []
    for rows, batch in images.batches(chosen, batch_size):
        if not len(rows):
            continue
        each(batch)
        pooled, logits = teacher.look(batch)
        top = logits.float().softmax(1).topk(min(2, logits.shape[1]))
        values, classes = top.values, top.indices
        if logits.shape[1] == 1:  # one class has no runner-up
            values, classes = values.expand(-1, 2) * values.new_tensor([1.0, 0.0]), classes.expand(-1, 2)
        kept = pooled.float() if features else pooled.new_empty(len(rows), 0).float()
        columns = (classes[:, 0], classes[:, 1], values[:, 0], values[:, 0] - values[:, 1], kept)
        parts.append((rows, *(column.cpu().numpy() for column in columns)))
        advance(len(rows))
    if not parts:
        raise DataError("none of the images can be decoded")
    index, first, second, confidence, margin, pooled_all = (np.concatenate(column) for column in zip(*parts))
    return View(index, first, second, confidence, margin, pooled_all)


@torch.no_grad()
def augmented_entropy(
    config: LookRecipe,
    teacher: Teacher,
    images: ImageRecords,
    indices: NDArray[np.int64],
    progress: Progress,
) -> tuple[float, float]:
    """Relative entropy of the teacher's classes for these images augmented, and augmented and mixed."""
    counts = torch.zeros(2, teacher.num_classes, dtype=torch.int64)
    generator = torch.Generator(teacher.device).manual_seed(config.seed)
    augment = regime(config.regime)
    task = progress.task("augment", total=len(indices), unit="img")
    for rows, batch in images.batches(indices, config.batch_size):
        if not len(rows):
            continue
        changed = augment(batch, generator)
        for row, shown in enumerate((changed, mixup(changed, generator).images)):
            predicted = teacher(shown).argmax(1).cpu()
            counts[row] += torch.bincount(predicted, minlength=teacher.num_classes)
        task.advance(len(rows))
    return relative_entropy(counts[0]), relative_entropy(counts[1])
