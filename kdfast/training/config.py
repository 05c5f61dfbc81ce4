"""How a run is set up, and what it hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import nn

from kdfast.errors import ConfigError
from kdfast.training.bounds import check_finite
from kdfast.training.optim import OptimizerConfig, ScheduleConfig


class Stateful(Protocol):
    """Anything whose state belongs in a checkpoint: a replay buffer, a generator of batches."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors, numbers, strings, nested in dicts and lists."""

    def load_state_dict(self, state: Any) -> None:
        """Put it back."""


@dataclass(frozen=True)
class TrainerConfig:
    """How a network is trained.

    Attributes:
        epochs: Passes over the batches.
        max_steps: Stop after this many optimiser steps instead, over as many epochs as that takes.
        seed: For Python, NumPy and torch; each rank adds its number.
        device: ``"auto"`` takes the GPU if there is one.
        precision: ``"bf16"`` and ``"fp16"`` run the step under autocast (fp16 with loss scaling).
        accumulate: Batches that share one optimiser step; their mean gradient is taken.
        clip_grad_norm: Upper bound of the gradient's norm.
        ema_decay: Keep an exponential moving average of the weights; it is what is evaluated and returned.
        optimizer: The optimiser.
        schedule: Its learning rate over time.
        eval_every: Epochs between evaluations; the last epoch is always evaluated.
        checkpoint_every: Epochs between checkpoints.
        checkpoint_steps: Optimiser steps between checkpoints within an epoch.
        keep: Checkpoints that stay on disk.
        log_every: Optimiser steps between lines of the log (each waits for the device once).
        tensorboard: Mirror the log to TensorBoard.
        progress: Show a progress bar.
    """

    epochs: int = 1
    max_steps: int | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: int = 1
    clip_grad_norm: float | None = None
    ema_decay: float | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval_every: int = 1
    checkpoint_every: int = 1
    checkpoint_steps: int | None = None
    keep: int = 2
    log_every: int = 50
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "max_steps",
            "accumulate",
            "eval_every",
            "checkpoint_every",
            "keep",
            "log_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, accepted: at least 1")
        if self.clip_grad_norm is not None:
            check_finite("clip_grad_norm", self.clip_grad_norm, 0, above=True)
        if self.ema_decay is not None:
            check_finite("ema_decay", self.ema_decay, 0)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run hands back.

    Attributes:
        model: The trained network (the moving average if one was kept), unwrapped, in evaluation mode.
        metrics: The last evaluation, plus ``best_accuracy`` (or ``best_miou``) and ``best_epoch`` where it is measured.
        steps: Optimiser steps taken over all resumed parts.
        images: Images that went through the network.
        seconds: Wall-clock time over all resumed parts.
    """

    model: nn.Module
    metrics: dict[str, float]
    steps: int
    images: int
    seconds: float

    def __repr__(self) -> str:
        """What came out, without the network's layers."""
        measured = "".join(f", {name} {value:.4g}" for name, value in self.metrics.items())
        done = f"{self.steps:,} steps, {self.images:,} images, {self.seconds:.1f} s"
        return f"TrainResult({type(self.model).__name__}: {done}{measured})"
