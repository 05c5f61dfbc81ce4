"""What ``teach`` and ``distill`` have in common: the training part of a recipe, and the result directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types as at
import torch
from torch import nn

from kdfast.data.datasets import LabelledImages, load_dataset
from kdfast.data.segmentation import SegmentationFolder, open_segmentation
from kdfast.errors import ConfigError
from kdfast.experiments.common.augmentation import Augmentation
from kdfast.experiments.common.image_batches import ImageBatches
from kdfast.experiments.common.recipe import to_yaml
from kdfast.training import files
from kdfast.training.config import TrainerConfig, TrainResult
from kdfast.training.evaluate import class_accuracies, evaluate_classification, evaluate_segmentation
from kdfast.training.model_io import ModelConfig, save_model
from kdfast.training.optim import OptimizerConfig, ScheduleConfig
from kdfast.training.trainer import Trainer

Positive = Annotated[float, at.Gt(0)]
NotNegative = Annotated[float, at.Ge(0)]
Count = Annotated[int, at.Ge(1)]
AugmentName = Literal[
    "crop",
    "resized_crop",
    "flip",
    "rand_augment",
    "color_jitter",
    "erase",
    "scale_crop",
    "standard",
    "high",
    "extreme",
]

Labelled = LabelledImages | SegmentationFolder

RECIPE = "recipe.yaml"
METRICS = "metrics.json"


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """The part of a recipe that says how a network is trained.

    Attributes:
        epochs: Passes over the images.
        iterations: Optimiser steps instead of epochs.
        batch_size: Images a step and process (``accumulate`` times as many for one optimiser step).
        optimizer: ``sgd``, ``adamw`` or ``rmsprop``.
        lr: Highest learning rate.
        weight_decay: Its weight decay.
        momentum: Of SGD and RMSprop.
        nesterov: Of SGD.
        schedule: ``constant``, ``multistep``, ``step``, ``cosine`` or ``poly``.
        milestones: Epochs at which ``multistep`` multiplies the rate by ``lr_decay``.
        lr_decay: See there; also what ``step`` multiplies by.
        decay_epochs: How often ``step`` does; may be a fraction.
        warmup_epochs: Linear warm-up.
        min_lr: Where ``cosine`` ends.
        augment: Any of ``crop`` (4 pixels of padding), ``resized_crop`` (8 to 100 % of the area), ``flip``,
            ``rand_augment`` (two operations at 9 of 30), ``color_jitter`` (0.4), ``erase`` (a quarter of them),
            or a regime of :mod:`kdfast.data.regimes`, ``standard``, ``high``, ``extreme``; for segmentation
            ``scale_crop`` (0.5 to 2 times) and ``flip``.
        accumulate: Batches that share an optimiser step.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        clip_grad_norm: Upper bound of the gradient's norm.
        ema_decay: Keep, evaluate and save a moving average of the weights.
        seed: Of weights, order and augmentation.
        device: ``auto`` takes the GPU if there is one.
        workers: Decoding threads or processes; ``None`` lets the loader choose.
        stem: ``imagenet`` for the 7×7 stem of resnet18, 34 and 50.
        eval_every: Epochs between evaluations.
        checkpoint_every: Epochs between checkpoints.
        checkpoint_steps: Optimiser steps between checkpoints within an epoch.
        keep: Checkpoints that stay.
        log_every: Optimiser steps between log lines.
        tensorboard: Write TensorBoard's files.
    """

    epochs: Count = 100
    iterations: Count | None = None
    batch_size: Count = 64
    optimizer: Literal["sgd", "adamw", "rmsprop"] = "sgd"
    lr: Positive = 0.05
    weight_decay: NotNegative = 5e-4
    momentum: Annotated[float, at.Ge(0), at.Lt(1)] = 0.9
    nesterov: bool = False
    schedule: Literal["constant", "multistep", "step", "cosine", "poly"] = "constant"
    milestones: tuple[Positive, ...] = ()
    lr_decay: Positive = 0.1
    decay_epochs: Positive = 1.0
    warmup_epochs: NotNegative = 0.0
    min_lr: NotNegative = 0.0
    augment: tuple[AugmentName, ...] = ()
    accumulate: Count = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip_grad_norm: Positive | None = None
    ema_decay: Annotated[float, at.Gt(0), at.Lt(1)] | None = None
    seed: Annotated[int, at.Ge(0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, at.Ge(0)] | None = None
    stem: Literal["cifar", "imagenet"] | None = None
    eval_every: Count = 1
    checkpoint_every: Count = 1
    checkpoint_steps: Count | None = None
    keep: Count = 2
    log_every: Count = 50
    tensorboard: bool = True

    def __post_init__(self) -> None:
        self._schedule()  # refuses milestones that do not fit it
        if self.min_lr and (self.schedule != "cosine" or self.min_lr > self.lr):
            raise ConfigError(f"min_lr: got {self.min_lr}, accepted: 0, or with schedule cosine up to lr")
        if self.decay_epochs != 1 and self.schedule != "step":
            raise ConfigError(
                f"decay_epochs: got {self.decay_epochs}, accepted: 1, or any with schedule step"
            )

    def _schedule(self) -> ScheduleConfig:
        ratio = self.min_lr / self.lr
        return ScheduleConfig(
            self.schedule, self.milestones, self.lr_decay, self.warmup_epochs, ratio, self.decay_epochs
        )

    def trainer_config(self, *, progress: bool = True) -> TrainerConfig:
        """These fields, as the trainer wants them."""
        return TrainerConfig(
            epochs=self.epochs,
            max_steps=self.iterations,
            seed=self.seed,
            device=self.device,
            precision=self.precision,
            accumulate=self.accumulate,
            clip_grad_norm=self.clip_grad_norm,
            ema_decay=self.ema_decay,
            optimizer=OptimizerConfig(
                self.optimizer, self.lr, self.weight_decay, self.momentum, self.nesterov
            ),
            schedule=self._schedule(),
            eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
            checkpoint_steps=self.checkpoint_steps,
            keep=self.keep,
            log_every=self.log_every,
            tensorboard=self.tensorboard,
            progress=progress,
        )

    def augmentation(self, image_size: int) -> Augmentation | None:
        """The chain that ``augment`` names, for images of this size."""
        return Augmentation(self.augment, image_size) if self.augment else None

    def model_options(self) -> dict[str, Any]:
        """Further arguments of ``create_model``."""
        return {} if self.stem is None else {"stem": self.stem}


# What may change between a run and its resumption: it moves the work, not the result.
_FREE = {
    "device",
    "workers",
    "keep",
    "log_every",
    "tensorboard",
    "eval_every",
    "checkpoint_every",
    "checkpoint_steps",
}


def fingerprint(*configs: Any) -> dict[str, Any]:
    """What a resumed run must agree on, as JSON would hold it."""
    merged = {key: value for config in configs for key, value in asdict(config).items() if key not in _FREE}
    result: dict[str, Any] = json.loads(json.dumps(merged))
    return result


def open_run(out: str | Path, *configs: Any, resume: bool, main: bool = True) -> Path:
    """Make the result directory and write the recipe into it.

    Raises:
        ConfigError: It holds a run already and ``resume`` is false, or it cannot be a directory.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: got {folder}, which is a file, accepted: a directory")
    if main:
        if not resume and ((folder / "checkpoints").exists() or (folder / METRICS).exists()):
            raise ConfigError(
                f"--out: {folder} holds a run already; go on with --resume, or choose another directory"
            )
        with files.reporting_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        files.write_file(folder / RECIPE, to_yaml(*configs))
    return folder


def close_run(
    folder: Path, trainer: Trainer, result: TrainResult, model: ModelConfig, **facts: Any
) -> dict[str, Any]:
    """Write the network and ``metrics.json``, last: its presence says that the run is finished."""
    metrics = {**result.metrics, "steps": result.steps, "images": result.images, **facts}
    metrics["seconds"] = round(result.seconds, 3)
    if trainer.accelerator.is_main_process:
        save_model(folder, result.model, model)
        files.write_json(folder / METRICS, metrics)
    trainer.accelerator.wait_for_everyone()
    return metrics


class Evaluator:
    """Accuracy, or mIoU where labels are masks, on held-out images: what the trainer calls after an epoch."""

    def __init__(
        self, dataset: Labelled, config: ModelConfig, *, batch_size: int, trainer_rank: tuple[int, int]
    ) -> None:
        rank, world = trainer_rank
        self._config = config
        self._measure = (
            evaluate_segmentation if isinstance(dataset, SegmentationFolder) else evaluate_classification
        )
        self._batches = ImageBatches(
            dataset, batch_size, mean=config.mean, std=config.std, shuffle=False, rank=rank, world_size=world
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


def held_out(
    source: str | None, model: ModelConfig, label_column: str | None = None, *, task: str = "classification"
) -> Labelled | None:
    """The test split of a source, which must have the network's classes."""
    if source is None:
        return None
    common: dict[str, Any] = {"image_size": model.image_size, "num_classes": model.num_classes}
    if task == "segmentation":
        return open_segmentation(source, "test", **common)
    return load_dataset(source, "test", label_column=label_column, **common)


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds of every metric that all runs have."""
    names = [name for name in runs[0] if all(isinstance(run.get(name), (int, float)) for run in runs)]
    summary: dict[str, Any] = {"seeds": [run["seed"] for run in runs]}
    for name in names:
        if name in ("seed", "steps", "images"):
            continue
        values = torch.tensor([float(run[name]) for run in runs], dtype=torch.float64)
        summary[name] = [float(value) for value in values]
        summary[f"{name}_mean"] = float(values.mean())
        summary[f"{name}_std"] = float(values.std()) if len(runs) > 1 else 0.0
    return summary
