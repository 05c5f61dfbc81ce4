"""Held-out images, and how good a network is on them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from kdfast.data.datasets import LabelledImages, load_dataset
from kdfast.data.matching import match_classes
from kdfast.data.segmentation import SegmentationFolder, open_segmentation
from kdfast.experiments.common.image_batches import ImageBatches
from kdfast.training.evaluate import class_accuracies, evaluate_classification, evaluate_segmentation
from kdfast.training.model_io import ModelConfig

Labelled = LabelledImages | SegmentationFolder


class Evaluator:
    """Accuracy, or mIoU where labels are masks, on held-out images: what the trainer calls after an epoch."""

    def __init__(
        self,
        dataset: Labelled,
        config: ModelConfig,
        *,
        batch_size: int,
        trainer_rank: tuple[int, int],
        workers: int | None = None,
    ) -> None:
        rank, world = trainer_rank
        self._config = config
        self._measure = (
            evaluate_segmentation if isinstance(dataset, SegmentationFolder) else evaluate_classification
        )
        self._batches = ImageBatches(
            dataset,
            batch_size,
            mean=config.mean,
            std=config.std,
            shuffle=False,
            rank=rank,
            world_size=world,
            workers=workers,
        )

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """Evaluate the network where it is."""
        device = next(network.parameters()).device
        return self._measure(network, self._batches, num_classes=self._config.num_classes, device=device)

    def by_class(self, network: nn.Module) -> dict[str, float]:
        """Accuracy by class name, of classes that there are images of; empty for segmentation."""
        if self._measure is evaluate_segmentation:
            return {}
        device = next(network.parameters()).device
        count = self._config.num_classes
        values = class_accuracies(network, self._batches, num_classes=count, device=device)
        names = self._config.classes or tuple(map(str, range(count)))
        return {name: round(value, 6) for name, value in zip(names, values) if value == value}


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 ``[N, C, H, W]``, in units of [0, 1].

    A channel that does not vary gets 1, so that dividing by it is harmless.
    """
    values = images.double() / 255
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3))
    std = torch.where(std > 1e-6, std, 1.0)
    return tuple(round(float(v), 6) for v in mean), tuple(round(float(v), 6) for v in std)


def splits_itself(data: str | None, test_data: str | None) -> bool:
    """Whether one source is to be trained and tested on, so that a part of it must be held out where it has no splits.

    Two sources, or one, are used whole.
    """
    if data is None or test_data is None:
        return False
    return data == test_data or (Path(data).exists() and Path(data).resolve() == Path(test_data).resolve())


def held_out(
    source: str | None,
    model: ModelConfig,
    label_column: str | None = None,
    *,
    task: str = "classification",
    whole: bool = False,
) -> Labelled | None:
    """The test split of a source, its labels in the order of the network's classes; ``whole`` as in ``load_dataset``.

    Raises:
        DataError: An image is of a class that the network does not have.
    """
    if source is None:
        return None
    return open_matched(source, "test", model, label_column, task=task, whole=whole)


def open_matched(
    source: str,
    split: str,
    model: ModelConfig,
    label_column: str | None = None,
    *,
    task: str = "classification",
    image_size: int | None = None,
    whole: bool = False,
) -> Labelled:
    """A split of a source, its labels in the order of the network's classes; ``image_size`` for another than its.

    ``whole`` as in :func:`kdfast.data.load_dataset`: a source without splits is used whole.

    Raises:
        DataError: An image is of a class that the network does not have; both lists are shown.
    """
    size = image_size or model.image_size
    if task == "segmentation":
        # Masks without names have as many classes as the network.
        named = (Path(source) / "classes.txt").exists()
        masked = open_segmentation(
            source, split, whole=whole, image_size=size, num_classes=None if named else model.num_classes
        )
        return match_classes(masked, model.classes, model.num_classes)
    # The crop is of what measures; at another side than the network's, nothing was said of it.
    crop = model.crop_pct if size == model.image_size and split == "test" else 1.0
    dataset = load_dataset(
        source,
        split,
        whole=whole,
        label_column=label_column if source.startswith("hf:") else None,
        image_size=size,
        crop_pct=crop,
        interpolation=model.interpolation,
    )
    return match_classes(dataset, model.classes, model.num_classes)
