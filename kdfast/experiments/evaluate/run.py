"""``kdfast eval``: how good a saved network is."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch

from kdfast.data.loader import ShardLoader
from kdfast.data.manifest import is_shard_folder
from kdfast.data.matching import shard_class_names
from kdfast.data.naming import class_mapping
from kdfast.data.segmentation import is_segmentation_folder
from kdfast.errors import DataError
from kdfast.experiments.common.held_out import open_matched
from kdfast.experiments.common.image_batches import ImageBatches
from kdfast.experiments.common.networks import at_side, load_teacher
from kdfast.experiments.common.results import METRICS, writing
from kdfast.experiments.common.synthetic_set import ProbabilityVariance, describe
from kdfast.experiments.evaluate.config import EvalConfig
from kdfast.training import files
from kdfast.training.accelerator import make_accelerator
from kdfast.training.evaluate import evaluate_classification, evaluate_segmentation
from kdfast.training.model_io import ModelConfig
from kdfast.training.progress import Progress


def run(config: EvalConfig, *, progress: bool = True) -> dict[str, Any]:
    """Measure.

    Returns:
        ``accuracy``, ``top5_accuracy`` (from six classes on) and ``images``; for images with masks ``miou``,
        ``pixel_accuracy`` and ``images``. On shards also ``probability_variance``, how sharp the outputs are: the
        variance of an image's class probabilities, averaged over images; and ``settings``, how they were sampled.

    Raises:
        CheckpointError: The network cannot be read.
        DataError: The data cannot be used, or has other classes.
    """
    with ExitStack() as stack:
        # Before any work: whoever may not write there has nothing to wait for.
        out = None if config.out is None else stack.enter_context(writing(config.out))
        result = _measure(config, progress=progress)
        if out is not None:
            files.write_json(out / METRICS, result)
    return result


def _measure(config: EvalConfig, *, progress: bool) -> dict[str, Any]:
    device = make_accelerator(config.device).device
    model, taught = load_teacher(config.checkpoint, config, image_size=config.image_size, key="checkpoint")
    model_config = at_side(taught, config.image_size, config.crop_pct)
    model.to(device)
    variance, settings = ProbabilityVariance(), describe(config.data)
    with ExitStack() as stack:
        batches, images = _open(config, model_config, device, stack)
        bar = stack.enter_context(Progress(enabled=progress)).task("eval", total=images, unit="img")

        def counted() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            for batch in batches:
                yield batch
                bar.advance(len(batch[1]))

        known: dict[str, Any] = {"num_classes": model_config.num_classes, "device": device}
        if is_segmentation_folder(config.data):
            metrics = evaluate_segmentation(model, counted(), **known)
        else:
            metrics = evaluate_classification(model, counted(), observe=variance.update, **known)
    result: dict[str, Any] = {**metrics, "images": images}
    if settings:
        result |= {
            "probability_variance": variance.compute(),
            "settings": {**settings, "network": config.checkpoint},
        }
    return result


def _open(config: EvalConfig, model: ModelConfig, device: torch.device, stack: ExitStack) -> tuple[Any, int]:
    common: dict[str, Any] = {"mean": model.mean, "std": model.std, "shuffle": False, "device": device}
    split, whole = config.split or "test", config.split is None
    if is_segmentation_folder(config.data):
        masked = open_matched(config.data, split, model, task="segmentation", whole=whole)
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
        return _matched(shards, shard_class_names(config.data), model, config.data), shards.num_samples
    dataset = open_matched(config.data, split, model, whole=whole)
    return ImageBatches(dataset, config.batch_size, **common), len(dataset)


def _matched(
    shards: ShardLoader, names: tuple[str, ...], model: ModelConfig, source: str
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """A set's batches, with labels in the order of the network's classes where both have names."""
    if not names or len(model.classes) != model.num_classes or names == tuple(model.classes):
        return shards
    used = {int(label) for label in shards.labels}
    mapping = torch.from_numpy(class_mapping(names, model.classes, used, source))
    return ((images, mapping.to(labels.device)[labels]) for images, labels in shards)
