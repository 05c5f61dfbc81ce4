"""What a method is given by ``kdfast distill``, and what it asks of the trainer.

A method is one line of :data:`kdfast.experiments.distill.methods.METHODS` and one module beside that list, which holds

- ``CONFIG``: the frozen dataclass of its own recipe keys,
- ``METHOD``: the class that a user's own loop would use,
- ``uses_labels(config)``, where it can do without the labels of its images: whether it does;
- ``NEEDS_DATA``: whether it trains on what ``data:`` names, or makes its own,
- ``build(setting) -> Plan``: the networks, the step and, where it makes its own, the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from kdfast.experiments.common.synthetic_set import describe
from kdfast.experiments.distill.config import DistillConfig
from kdfast.training.batches import Loss
from kdfast.training.model_io import ModelConfig


@dataclass(frozen=True)
class Setting:
    """What a method is given.

    Attributes:
        config: The part of the recipe that all methods share.
        method: The method's own part.
        teacher: On the device, in evaluation mode, without gradients.
        student: On the device, with fresh weights drawn from the recipe's seed.
        described: What the student is and how images are normalised for it.
        accelerator: 🤗 Accelerate's, for device, rank and precision.
        num_classes: Of the teacher.
        dry_run: One step is all that will be taken.
    """

    config: DistillConfig
    method: Any
    teacher: nn.Module
    student: nn.Module
    described: ModelConfig
    accelerator: Any
    num_classes: int
    dry_run: bool = False


def _itself(model: nn.Module) -> nn.Module:
    return model


def _nothing() -> Mapping[str, Any]:
    return {}


def _leave_nothing(_: Path) -> None:
    pass


@dataclass(frozen=True)
class Plan:
    """What a method asks of the trainer.

    Attributes:
        model: What is optimised, wrapped for several processes and saved in checkpoints: the student, together with
            any parameters of the method's own.
        step: Called as ``step(model, batch)``; returns the loss, or the loss and 0-d tensors to log beside it.
        batches: The method's own data, with ``len()``, ``state_dict`` and ``load_state_dict``; ``None`` takes ``data``.
        student: From the trained model to the network that is evaluated and saved; must not have one extra key.
        facts: Called at the end: further entries of ``metrics.json``.
        leave: Called after that with the result directory, by the main process: pictures that belong there.
        normalised: Whether ``data`` comes normalised for the networks; a step that wants images in [0, 1] says no, and
            normalises them itself.
    """

    model: nn.Module
    step: Callable[[nn.Module, Any], Loss]
    batches: Any = None
    student: Callable[[nn.Module], nn.Module] = _itself
    facts: Callable[[], Mapping[str, Any]] = _nothing
    leave: Callable[[Path], None] = _leave_nothing
    normalised: bool = True


def settings_of(setting: Setting) -> dict[str, Any]:
    """What ``kdfast report`` plots accuracies against: the method's keys, the set's facts, and both networks' names.

    Read before training, while the set is there.
    """
    config = setting.config
    networks = {"student": config.student, "teacher": config.teacher}
    return {**asdict(setting.method), **describe(config.data), **networks}


def uses_labels(method: Any, config: Any) -> bool:
    """Whether the labels of the images that a method trains on count: then their classes must be the teacher's.

    A method's module says so in ``uses_labels(config)``; without it they do.
    """
    says = getattr(method, "uses_labels", None)
    return True if says is None else bool(says(config))


class Method(Protocol):
    """What the module of a method holds."""

    CONFIG: type
    METHOD: type
    NEEDS_DATA: bool

    def build(self, setting: Setting) -> Plan:
        """Make the networks, the step and the data."""
