"""What a recipe's ``data:`` names, as batches for the trainer: shards, or real labelled images."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from kdfast.data import select_balanced
from kdfast.data.datasets import InMemoryImages, LabelledImages, load_dataset
from kdfast.data.loader import ShardLoader
from kdfast.data.manifest import is_shard_folder, read_manifest
from kdfast.errors import DataError
from kdfast.experiments.common.held_out import open_matched, splits_itself
from kdfast.experiments.common.image_batches import ImageBatches
from kdfast.experiments.distill.config import DistillConfig
from kdfast.training.model_io import ModelConfig


def open_training_data(
    config: DistillConfig,
    model: ModelConfig,
    accelerator: Any,
    stack: ExitStack,
    *,
    labelled: bool = True,
    records: bool = False,
) -> ShardLoader | ImageBatches:
    """Full batches, shuffled by the recipe's seed, this process's share of them.

    Args:
        config: ``data``, its sizes and its augmentation.
        model: Image size, normalisation and classes.
        accelerator: For device and rank.
        stack: Closes the loader.
        labelled: Whether labels count. If not, images of anything will do: Aircraft for a teacher of Pets.
        records: Batches of images and their numbers, instead of their labels.

    Raises:
        DataError: The data cannot be used, or has other classes than the teacher.
    """
    common: dict[str, Any] = {
        "device": accelerator.device,
        "augment": config.augmentation(model.image_size),
        "seed": config.seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "mean": model.mean,
        "std": model.std,
        "records": records,
    }
    source = str(config.data)
    size = config.load_size or model.image_size
    if config.task == "classification" and is_shard_folder(source):
        total = read_manifest(source).num_samples
        if config.data_images is not None and config.data_images > total:
            raise DataError(f"data {source}: has {total} images, data_images asks for {config.data_images}")
        return stack.enter_context(
            ShardLoader(
                source,
                config.batch_size,
                image_size=size,
                on_error=config.on_error,
                last_batch="fill",  # full batches everywhere: ranks in step, shapes that compile once
                loader=config.loader,
                num_workers=config.workers,
                images=config.data_images,
                **common,
            )
        )
    dataset: Any
    if config.task == "segmentation":
        whole = not splits_itself(source, config.test_data)
        dataset = open_matched(source, "train", model, task="segmentation", image_size=size, whole=whole)
    else:
        dataset = _labelled(config, source, size, model if labelled else None)
        if config.data_images is not None:
            if records:
                raise DataError(
                    f"data_images: got {config.data_images} of {source}, accepted with stored labels: null (of shards "
                    "the first so many)"
                )
            dataset = some_of(dataset, config.data_images, config.seed)
    return ImageBatches(dataset, config.batch_size, workers=config.workers, **common)


def some_of(dataset: LabelledImages, count: int, seed: int) -> InMemoryImages:
    """So many images, as many of each class, in memory.

    Raises:
        DataError: There are not as many.
    """
    if count > len(dataset):
        raise DataError(f"data {dataset.source}: has {len(dataset)} images, data_images asks for {count}")
    chosen = select_balanced(dataset.labels, count, dataset.num_classes, seed=seed)
    images = torch.stack([dataset[index][0] for index in chosen.tolist()])
    return InMemoryImages(images, dataset.labels[chosen], dataset.classes, dataset.source)


def _labelled(config: DistillConfig, source: str, size: int, model: ModelConfig | None) -> Any:
    """Images with the classes of a network, or with whatever classes they have."""
    whole = not splits_itself(source, config.test_data)
    try:
        if model is None:
            return _unlabelled(config, source, size, whole)
        return open_matched(source, "train", model, config.label_column, image_size=size, whole=whole)
    except DataError as error:
        if not Path(source).is_dir():
            raise
        # Whoever meant shards must learn what is missing.
        raise DataError(f"data {source}: holds no manifest.json, so no shards; as images: {error}") from error


def _unlabelled(config: DistillConfig, source: str, size: int, whole: bool) -> LabelledImages:
    """The images alone: the column of another set's labels is nothing to them."""
    same = source == config.test_data
    return load_dataset(
        source, "train", whole=whole, image_size=size, label_column=config.label_column if same else None
    )
