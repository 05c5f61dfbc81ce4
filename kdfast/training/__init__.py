"""Training on 🤗 Accelerate: the loop, optimisers, checkpoints without pickle, evaluation, logs, progress.

Names are imported on first use, so that ``import kdfast.training`` costs nothing and needs no extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdfast.lazy import attributes

if TYPE_CHECKING:
    from kdfast.training.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
    from kdfast.training.config import TrainerConfig, TrainResult
    from kdfast.training.evaluate import evaluate_classification, evaluate_segmentation
    from kdfast.training.interrupt import TrainingInterrupted
    from kdfast.training.learning import StepModule
    from kdfast.training.metrics import MetricsLog, read_metrics
    from kdfast.training.model_io import ModelConfig, load_model, load_model_config, save_model
    from kdfast.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer, build_schedule
    from kdfast.training.progress import Progress
    from kdfast.training.trainer import Trainer

_HOME = {
    "checkpoint": ("Checkpoint", "latest_checkpoint", "load_checkpoint", "save_checkpoint"),
    "config": ("TrainResult", "TrainerConfig"),
    "evaluate": ("evaluate_classification", "evaluate_segmentation"),
    "interrupt": ("TrainingInterrupted",),
    "learning": ("StepModule",),
    "metrics": ("MetricsLog", "read_metrics"),
    "model_io": ("ModelConfig", "load_model", "load_model_config", "save_model"),
    "optim": ("OptimizerConfig", "ScheduleConfig", "build_optimizer", "build_schedule"),
    "progress": ("Progress",),
    "trainer": ("Trainer",),
}

__all__ = [
    "Checkpoint",
    "MetricsLog",
    "ModelConfig",
    "OptimizerConfig",
    "Progress",
    "ScheduleConfig",
    "StepModule",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "TrainingInterrupted",
    "build_optimizer",
    "build_schedule",
    "evaluate_classification",
    "evaluate_segmentation",
    "latest_checkpoint",
    "load_checkpoint",
    "load_model",
    "load_model_config",
    "read_metrics",
    "save_checkpoint",
    "save_model",
]


__getattr__ = attributes(__name__, {name: module for module, names in _HOME.items() for name in names})
