"""The training part of a recipe: what ``teach`` and ``distill`` have in common."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import annotated_types as at

from kdfast.errors import ConfigError
from kdfast.experiments.common.augmentation import Augmentation
from kdfast.experiments.common.bounds import Count, NotNegative, Positive, Seed
from kdfast.training.config import TrainerConfig
from kdfast.training.optim import OptimizerConfig, ScheduleConfig

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


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """The part of a recipe that says how a network is trained.

    Attributes:
        epochs: Passes over the images.
        iterations: Optimiser steps instead of epochs.
        batch_size: Images a step, of all processes together: each of 8 takes an eighth (``accumulate`` times as
            many for one optimiser step).
        optimizer: ``sgd``, ``adamw`` or ``rmsprop``.
        lr: Highest learning rate.
        weight_decay: L2 penalty of SGD and RMSprop, decoupled decay of AdamW.
        momentum: Momentum of SGD and RMSprop.
        nesterov: Nesterov's momentum, for SGD.
        schedule: ``constant``, ``multistep``, ``step``, ``cosine`` or ``poly``.
        milestones: Epochs at which ``multistep`` multiplies the rate by ``lr_decay``.
        lr_decay: What ``multistep`` and ``step`` multiply the rate by.
        decay_epochs: Epochs between the falls of ``step``; may be a fraction.
        warmup_epochs: Epochs of linear warm-up; may be a fraction.
        min_lr: Rate at which ``cosine`` ends.
        augment: Any of ``crop`` (4 pixels of padding), ``resized_crop`` (8 to 100 % of the area), ``flip``,
            ``rand_augment`` (two operations at 9 of 30), ``color_jitter`` (0.4), ``erase`` (a quarter of them),
            or a regime of :mod:`kdfast.data.regimes`, ``standard``, ``high``, ``extreme``; for segmentation
            ``scale_crop`` (0.5 to 2 times) and ``flip``.
        accumulate: Batches that share an optimiser step.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        clip_grad_norm: Upper bound of the gradient's norm.
        ema_decay: Keep, evaluate and save a moving average of the weights.
        seed: Seed of weights, order and augmentation.
        device: ``auto`` takes the GPU if there is one.
        workers: Decoding threads or processes; 0 decodes in the training process, ``None`` lets the loader choose.
        stem: ``imagenet`` for the 7×7 stem of resnet18, 34 and 50.
        width: Of ``mobilenet_v1`` and ``mobilenet_v2``: a factor on all channels; ``mobilenet_v2`` is CRD's half-width
            network without it, 1 is its paper's.
        eval_every: Epochs between evaluations.
        checkpoint_every: Epochs between checkpoints.
        checkpoint_steps: Optimiser steps between checkpoints within an epoch.
        keep: Checkpoints that stay on disk.
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
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, at.Ge(0)] | None = None
    stem: Literal["cifar", "imagenet"] | None = None
    width: Positive | None = None
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

    def share(self, processes: int) -> int:
        """Images a step of one process of so many.

        Raises:
            ConfigError: The batch cannot be shared out evenly.
        """
        if self.batch_size % processes:
            raise ConfigError(
                f"batch_size: got {self.batch_size} for {processes} processes, accepted: a multiple of {processes} "
                "(it counts the images of all of them)"
            )
        return self.batch_size // processes

    def trainer_config(self, *, progress: bool = True) -> TrainerConfig:
        """These fields, as the trainer wants them."""
        named: dict[str, Any] = {
            field.name: getattr(self, field.name, None) for field in fields(TrainerConfig)
        }
        differing: dict[str, Any] = {
            "max_steps": self.iterations,
            "optimizer": OptimizerConfig(
                self.optimizer, self.lr, self.weight_decay, self.momentum, self.nesterov
            ),
            "schedule": self._schedule(),
            "progress": progress,
        }
        return TrainerConfig(**{**named, **differing})

    def augmentation(self, image_size: int) -> Augmentation | None:
        """The chain that ``augment`` names, for images of this size."""
        return Augmentation(self.augment, image_size) if self.augment else None

    def model_options(self) -> dict[str, Any]:
        """Further arguments of ``create_model``."""
        given = {"stem": self.stem, "width": self.width}
        return {name: value for name, value in given.items() if value is not None}
