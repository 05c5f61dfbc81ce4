"""``kdfast eval``: how good a saved network is."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kdfast.data.datasets import load_dataset
from kdfast.data.loader import ShardLoader
from kdfast.data.manifest import is_shard_folder
from kdfast.data.segmentation import is_segmentation_folder, open_segmentation
from kdfast.errors import DataError
from kdfast.experiments.image_batches import ImageBatches
from kdfast.training.accelerator import make_accelerator
from kdfast.training.evaluate import evaluate_classification, evaluate_segmentation
from kdfast.training.model_io import ModelConfig, load_model, load_model_config
from kdfast.training.progress import Progress


@dataclass(frozen=True)
class EvalConfig:
    """What to measure on what.

    Attributes:
        checkpoint: Directory of a finished run, or its ``model.safetensors``.
        data: ``digits``, a folder of images, ``hf:NAME``, a directory of shards, or a folder of ``images/`` and
            ``masks/`` (see :mod:`kdfast.data.segmentation`).
        split: ``train``, ``test`` or ``all``; shards have no splits.
        batch_size: Images a batch.
        device: ``auto`` takes the GPU if there is one.
        loader: For shards: ``dali`` or ``torch``.
    """

    checkpoint: str
    data: str
    split: Literal["train", "test", "all"] = "test"
    batch_size: int = 256
    device: Literal["auto", "cpu", "cuda"] = "auto"
    loader: Literal["dali", "torch"] = "dali"


def run(config: EvalConfig, *, progress: bool = True) -> dict[str, Any]:
    """Measure.

    Returns:
        ``accuracy``, ``top5_accuracy`` (from six classes on) and ``images``; for images with masks ``miou``,
        ``pixel_accuracy`` and ``images``.

    Raises:
        CheckpointError: The network cannot be read.
        DataError: The data cannot be used, or has other classes.
    """
    device = make_accelerator(config.device).device
    model_config = load_model_config(config.checkpoint)
    model = load_model(config.checkpoint, device=device)
    with ExitStack() as stack:
        batches, images = _open(config, model_config, device, stack)
        bar = stack.enter_context(Progress(enabled=progress)).task("eval", total=images, unit="img")

        def counted() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            for batch in batches:
                yield batch
                bar.advance(len(batch[1]))

        measure = evaluate_segmentation if is_segmentation_folder(config.data) else evaluate_classification
        metrics = measure(model, counted(), num_classes=model_config.num_classes, device=device)
    return {**metrics, "images": images}


def _open(config: EvalConfig, model: ModelConfig, device: torch.device, stack: ExitStack) -> tuple[Any, int]:
    common: dict[str, Any] = {"mean": model.mean, "std": model.std, "shuffle": False, "device": device}
    if is_segmentation_folder(config.data):
        masked = open_segmentation(
            config.data, config.split, image_size=model.image_size, num_classes=model.num_classes
        )
        return ImageBatches(masked, config.batch_size, **common), len(masked)
    if is_shard_folder(config.data):
        shards = stack.enter_context(
            ShardLoader(
                config.data, config.batch_size, image_size=model.image_size, loader=config.loader, **common
            )
        )
        if shards.num_classes not in (None, model.num_classes):
            raise DataError(
                f"data {config.data}: has {shards.num_classes} classes, accepted: {model.num_classes}, the network's"
            )
        return shards, shards.num_samples
    dataset = load_dataset(
        config.data, config.split, image_size=model.image_size, num_classes=model.num_classes
    )
    return ImageBatches(dataset, config.batch_size, **common), len(dataset)
