"""``kdfast teach``: train a network on real, labelled images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdfast.data.datasets import load_dataset
from kdfast.data.segmentation import open_segmentation
from kdfast.experiments.common.held_out import (
    Evaluator,
    Labelled,
    channel_statistics,
    held_out,
    splits_itself,
)
from kdfast.experiments.common.image_batches import ImageBatches
from kdfast.experiments.common.networks import build_network
from kdfast.experiments.common.opening import (
    Speaker,
    millions,
    parameters_of,
    say_checked,
    say_closing,
    say_data,
    say_training,
)
from kdfast.experiments.common.results import best_keeper, close_run, fingerprint, open_run
from kdfast.experiments.teach.config import TeachConfig
from kdfast.training.accelerator import make_accelerator
from kdfast.training.mixing import task_loss
from kdfast.training.model_io import ModelConfig
from kdfast.training.rng import seed_everything
from kdfast.training.trainer import Trainer

_STATISTICS_OF = 2000  # images that mean and standard deviation are taken from, evenly spaced


def run(
    config: TeachConfig,
    out: str | Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    talk: bool = True,
) -> dict[str, Any]:
    """Train and save a teacher.

    Args:
        config: What to do.
        out: Result directory: ``model.safetensors`` and ``config.json``, ``metrics.json``, ``metrics.jsonl``,
            ``recipe.yaml``, ``checkpoints/``, ``tensorboard/``.
        resume: Go on from its latest checkpoint.
        dry_run: Build everything, take one optimiser step, write nothing.
        progress: Show a progress bar.
        talk: With it, say first what is trained on what, and at the end how it went.

    Returns:
        What ``metrics.json`` holds; of a dry run the ``loss``.

    Raises:
        ConfigError: The model is unknown, or ``out`` holds another run.
        DataError: The data cannot be used.
        TrainingInterrupted: On Ctrl-C, after a checkpoint.
    """
    dataset = _open(config)
    described = _describe(config, dataset)
    accelerator = make_accelerator(config.device, config.precision)
    rank = (accelerator.process_index, accelerator.num_processes)
    source = config.test_data or config.data
    whole = not splits_itself(config.data, source)
    test = held_out(source, described, config.label_column, task=config.task, whole=whole)
    seed_everything(config.seed)
    weights = {"pretrained": True} if config.pretrained else {}
    network = build_network(replace(described, options={**described.options, **weights}))
    batches = ImageBatches(
        dataset,
        config.share(rank[1]),
        mean=described.mean,
        std=described.std,
        augment=config.augmentation(config.image_size),
        seed=config.seed,
        rank=rank[0],
        world_size=rank[1],
        workers=config.workers,
        device=accelerator.device,
    )
    evaluate = None
    if test is not None:
        evaluate = Evaluator(
            test,
            described,
            batch_size=max(config.batch_size, 256),
            trainer_rank=rank,
            workers=config.workers,
        )
    folder = None if dry_run else open_run(out, config, resume=resume, main=accelerator.is_main_process)
    speaker = Speaker(progress and talk and accelerator.is_main_process)
    size = parameters_of(network)
    trainer = Trainer(
        network,
        lambda model, batch: task_loss(model(batch[0]), batch[1]),
        config.trainer_config(progress=progress),
        out=folder,
        evaluate=evaluate,
        fingerprint=fingerprint(config),
        name="teach",
        keep_best=best_keeper(folder),
    )
    say_data(speaker, "data", batches, config.image_size)
    say_data(speaker, "test", test, config.image_size)
    speaker.say("network", config.model, f"{millions(size)} parameters")
    say_training(speaker, config, trainer.steps_of(batches), accelerator)
    if folder is None:
        loss = trainer.dry_run(batches)
        say_checked(speaker, loss, "every key of the recipe", "the data, opened and decoded", "the network")
        return {"loss": loss}
    result = trainer.fit(batches, resume=resume)
    metrics = close_run(folder, trainer, result, described, seed=config.seed, parameters=size)
    say_closing(speaker, folder, metrics, student=(config.model, size))
    return metrics


def _open(config: TeachConfig) -> Labelled:
    whole = not splits_itself(config.data, config.test_data or config.data)
    common: dict[str, Any] = {
        "image_size": config.image_size,
        "num_classes": config.num_classes,
        "whole": whole,
    }
    if config.task == "segmentation":
        return open_segmentation(config.data, "train", **common)
    return load_dataset(config.data, "train", label_column=config.label_column, **common)


def _describe(config: TeachConfig, dataset: Labelled) -> ModelConfig:
    picked = torch.linspace(0, len(dataset) - 1, min(_STATISTICS_OF, len(dataset))).long().tolist()
    mean, std = channel_statistics(torch.stack([dataset[index][0] for index in picked]))
    described = ModelConfig(
        config.model,
        dataset.num_classes,
        config.image_size,
        mean,
        std,
        classes=tuple(dataset.classes),
        crop_pct=config.crop_pct,
    )
    return replace(described, options=config.model_options(), crop_pct=config.crop_pct)
