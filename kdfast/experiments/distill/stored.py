"""``labels=stored``: students learn from a teacher's outputs as ``kdfast label`` stored them, without the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data.loader import ShardLoader
from kdfast.data.segmentation import SegmentationFolder
from kdfast.errors import ConfigError, DataError
from kdfast.experiments.common.image_batches import ImageBatches
from kdfast.experiments.common.stored_labels import StoredLabels
from kdfast.experiments.distill.config import DistillConfig
from kdfast.training.batches import Loss

STORED = "stored"
#: What looks at nothing of the teacher but its logits.
METHODS = ("dist", "dkd", "dmkd", "kd", "surrogate")
#: Fields that change images after the teacher saw them, and what leaves them as they were.
_CHANGING: dict[str, Any] = {
    "cutmix_alpha": None,
    "mixup_alpha": None,
    "mixup": False,
    "attack": False,
    "regime": "none",
}


def with_labels(values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """A recipe's values, ``labels: stored`` said in full: where they are, and whose outputs.

    Raises:
        ConfigError: There is no data that they could be beside, or another teacher is named than theirs.
        CheckpointError: There are none, or they are damaged.
    """
    full = dict(values)
    if full.get("labels") == STORED:
        del full["labels"]
        full.setdefault("labels_from", full.get("data"))
        if full["labels_from"] is None:
            raise ConfigError(
                f"{source}: labels: got stored without data, accepted: data=DIR, or labels_from=DIR"
            )
    where = full.get("labels_from")
    if not isinstance(where, str):
        return full
    teacher, named = StoredLabels(where).teacher, full.get("teacher")
    if isinstance(named, str) and named != teacher and not _same_place(named, teacher):
        raise ConfigError(
            f"{source}: teacher: got {named}, accepted: {teacher}, whose outputs {where} holds, or none"
        )
    return {**full, "teacher": teacher}


def _same_place(one: str, other: str) -> bool:
    return Path(one).exists() and Path(one).resolve() == Path(other).resolve()


def open_stored(config: DistillConfig, method_config: Any) -> StoredLabels | None:
    """The labels that a recipe names, if it does, after making sure that its method can learn from them.

    Raises:
        ConfigError: It needs the teacher itself, or changes images after the teacher saw them.
        CheckpointError: There are none, or they are damaged.
    """
    if config.labels_from is None:
        return None
    if config.method not in METHODS:
        raise ConfigError(
            f"labels: got stored for method {config.method}, which needs the teacher itself; accepted for: "
            + ", ".join(METHODS)
        )
    if config.task != "classification":
        raise ConfigError(f"labels: got stored for task {config.task}, accepted: classification")
    wrong = [
        f"{name}: got {_said(getattr(method_config, name))}, accepted with stored labels: {_said(still)}"
        for name, still in _CHANGING.items()
        if getattr(method_config, name, still) != still
    ]
    found = StoredLabels(config.labels_from)
    if config.augment and found.views.augment:
        wrong.append(
            f"augment: got {', '.join(config.augment)}, accepted: none; these labels are of images that are augmented "
            f"already, by {', '.join(found.views.augment)}"
        )
    if wrong:
        raise ConfigError("; ".join(wrong) + " (the teacher never saw such images)")
    if found.views.augment and config.image_size not in (None, found.image_size):
        raise ConfigError(
            f"image_size: got {config.image_size}, accepted: {found.image_size}, at which these labels' views were cut"
        )
    return found


def _said(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value))


class StoredTeacher(nn.Module):
    """Stands where a method asks its teacher: gives the outputs of the batch that was looked up last."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Tensor | None = None
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """The stored logits ``[B, C]`` of the batch at hand, whatever images are given."""
        if self.answer is None or len(self.answer) != len(images):
            raise RuntimeError("the stored labels of this batch were not looked up before its step")
        return self.answer


class StoredBatches:
    """A method's step over batches of images and their numbers, which become images, labels and stored outputs.

    Args:
        labels: The stored outputs.
        batches: Of images in [0, 1] and the images' numbers.
        teacher: What the method asks.
        step: The method's step, over images and their class labels.
        normalise: Mean and standard deviation per channel of what the step takes; None for images in [0, 1].

    Raises:
        DataError: The labels are of other images.
    """

    def __init__(
        self,
        labels: StoredLabels,
        batches: ShardLoader | ImageBatches,
        teacher: StoredTeacher,
        step: Callable[[nn.Module, Any], Loss],
        normalise: tuple[tuple[float, ...], tuple[float, ...]] | None,
    ) -> None:
        self._stored, self._teacher, self._step = labels, teacher, step
        self._normalise = None
        if normalise is not None:
            self._normalise = [torch.tensor(values).view(-1, 1, 1) for values in normalise]
        if isinstance(batches, ShardLoader):
            contents, self._labels = batches.fingerprint, torch.from_numpy(batches.record_labels)
        else:
            assert not isinstance(batches.dataset, SegmentationFolder)
            contents, self._labels = batches.dataset.contents(), batches.dataset.labels
        if contents != labels.contents:
            given = f"{labels.images:,} images of {labels.data} at side {labels.image_size}"
            raise DataError(
                f"labels {labels.folder}: are of {given}, which are not the {len(self._labels):,} of data as they are "
                "now; kdfast label writes those of these (with split=train, where a part is held out for test_data)"
            )

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Loss:
        """One step."""
        images, rows = batch[0], batch[1].cpu()
        # By torch's own generator, which checkpoints keep.
        view = torch.randint(self._stored.views.count, rows.shape)
        self._teacher.answer = self._stored.outputs(rows, view).to(images.device, non_blocking=True)
        images = self._stored.seen(images, rows, view)
        if self._normalise is not None:
            mean, std = (part.to(images.device, non_blocking=True) for part in self._normalise)
            images = (images - mean) / std
        return self._step(model, (images, self._labels[rows].to(images.device, non_blocking=True)))
