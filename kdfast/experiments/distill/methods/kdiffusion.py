"""``method: kdiffusion``: features, in the small steps of a reverse process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import ConfigError
from kdfast.experiments.distill.pictures import PICTURE, draw_maps
from kdfast.experiments.distill.plan import Plan, Setting
from kdfast.methods.kdiffusion import Kdiffusion, KdiffusionConfig, Stage

METHOD = Kdiffusion
NEEDS_DATA = True

_CAPTION = (
    "Held-out images, and the mean size of the last stage's feature over its channels: one branch's, the mean of all "
    "branches', the teacher's. Each map in its own range."
)


@dataclass(frozen=True)
class KdiffusionRecipe(KdiffusionConfig):
    """The method's fields, and the layers of one stage or of several, shallow to deep.

    Attributes:
        student_layers: The student's convolutions or linear layers that become branches, by name.
        student_norms: The batch norm right after each, by name; none are given for layers that have none.
        teacher_layers: The teacher's layers whose outputs they are compared to, by name.
    """

    student_layers: tuple[str, ...] = ()
    student_norms: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = len(self.student_layers), len(self.teacher_layers)
        if counts[0] == 0 or counts[0] != counts[1]:
            raise ConfigError(
                f"student_layers, teacher_layers: got {counts[0]} and {counts[1]}, accepted: as many of "
                "each, at least one"
            )
        if len(self.student_norms) not in (0, counts[0]):
            raise ConfigError(
                f"student_norms: got {len(self.student_norms)}, accepted: none, or one for each of student_layers"
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """As the method takes them."""
        norms = self.student_norms or (None,) * len(self.student_layers)
        layers = zip(self.student_layers, self.teacher_layers, norms, strict=True)
        return tuple(Stage(op, teacher, norm) for op, teacher, norm in layers)


CONFIG = KdiffusionRecipe


class _Step(nn.Module):
    """The method's whole step as a forward pass, so that several processes see one module."""

    def __init__(self, method: Kdiffusion) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.method.step((images, labels)), self.method.parts


def _exported(trained: nn.Module) -> nn.Module:
    method: Any = trained.method
    exported: nn.Module = method.export()
    return exported


def build(setting: Setting) -> Plan:
    """The student with its branches and bridges, under one step.

    Raises:
        ConfigError: A layer or a combination of fields that the networks do not allow.
    """
    config: KdiffusionRecipe = setting.method
    size = setting.described.image_size
    images = torch.zeros(2, 3, size, size, device=setting.accelerator.device)
    try:
        method = Kdiffusion(setting.student, setting.teacher, config.stages, images, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    pictured = setting.config.test_data is not None and config.alpha > 0

    def facts() -> dict[str, Any]:
        found: dict[str, Any] = {"extra_parameters": method.extra_parameters, "branches": config.branches}
        if pictured:
            found["captions"] = {PICTURE: _CAPTION}
        return found

    def leave(folder: Path) -> None:
        if pictured:
            draw(folder, method, setting)

    return Plan(
        _Step(method),
        lambda wrapped, batch: wrapped(*batch),
        student=_exported,
        facts=facts,
        leave=leave,
    )


def draw(folder: Path, method: Kdiffusion, setting: Setting) -> None:
    """For some held-out images a branch, the branches' mean and the teacher; nothing where features are vectors."""

    def maps(images: Tensor) -> list[Tensor]:
        branches, teacher = method.maps(images)[method.stages[-1].op]
        if teacher.dim() != 4:
            return []
        return [feature.float().abs().mean(1) for feature in (branches[0], branches.mean(0), teacher)]

    draw_maps(folder, setting, maps)
