"""Optimisers and learning-rate schedules of the papers, as configs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from kdfast.errors import ConfigError
from kdfast.training.bounds import check_finite

_RMSPROP_EPS = math.sqrt(1e-3)


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser.

    Attributes:
        name: ``"sgd"``, ``"adamw"``, or ``"rmsprop"`` (decay 0.9, ε 0.0316: at rest that damps like the 0.001 which
            TensorFlow and its ports add under the root).
        lr: Learning rate at its highest.
        weight_decay: L2 penalty for SGD and RMSprop, decoupled decay for AdamW.
        momentum: SGD and RMSprop.
        nesterov: SGD only.
        betas: AdamW only.
    """

    name: Literal["sgd", "adamw", "rmsprop"] = "sgd"
    lr: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "momentum"):
            check_finite(name, getattr(self, name), 0)
        for beta in self.betas:
            check_finite("betas", beta, 0)


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves, in epochs.

    Attributes:
        name: ``"constant"``, ``"multistep"`` (times ``gamma`` at each milestone), ``"step"`` (times ``gamma`` every
            ``every`` epochs), ``"cosine"`` (to ``min_ratio``) or ``"poly"`` ((1 − share done)^0.9).
        milestones: Epochs at which a multistep schedule falls; ascending.
        gamma: Factor at each milestone, or each ``every`` epochs.
        every: Epochs between the falls of ``"step"``; may be a fraction.
        warmup_epochs: Linear rise from zero; may be a fraction.
        min_ratio: Where a cosine ends, as a fraction of the highest rate.
    """

    name: Literal["constant", "multistep", "step", "cosine", "poly"] = "constant"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    min_ratio: float = 0.0
    every: float = 1.0

    def __post_init__(self) -> None:
        check_finite("every", self.every, 0, above=True)
        for name in ("gamma", "warmup_epochs", "min_ratio"):
            check_finite(name, getattr(self, name), 0)
        if self.name == "multistep" and not self.milestones:
            raise ConfigError(
                "milestones: got none, accepted: one or more epochs, ascending (schedule is multistep)"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ConfigError(f"milestones: got {list(self.milestones)}, accepted: ascending epochs")


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """The optimiser that ``config`` describes, over the parameters that require a gradient."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.name == "sgd":
        return SGD(
            trained,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
    if config.name == "adamw":
        return AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    if config.name == "rmsprop":
        return RMSprop(
            trained,
            lr=config.lr,
            alpha=0.9,
            eps=_RMSPROP_EPS,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
    raise ConfigError(f"optimizer: got {config.name!r}, accepted: sgd, adamw, rmsprop")


def build_schedule(
    optimizer: Optimizer, config: ScheduleConfig, *, steps_per_epoch: int, total_steps: int
) -> LambdaLR:
    """The schedule that ``config`` describes; call ``.step()`` after every optimiser step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(config, step, steps_per_epoch, total_steps))


def learning_rate_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """What the highest learning rate is multiplied by for optimiser step number ``step`` (from 0)."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "multistep":
        passed = sum(step >= round(milestone * steps_per_epoch) for milestone in config.milestones)
        return float(config.gamma**passed)
    if config.name == "step":
        return float(config.gamma ** (step // max(1, round(config.every * steps_per_epoch))))
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if config.name == "poly":
        return float((1 - done) ** 0.9)
    if config.name == "cosine":
        return config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
