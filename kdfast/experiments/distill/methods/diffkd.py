"""``method: diffkd``: features and logits, denoised before they are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdfast.errors import ConfigError
from kdfast.experiments.distill.pictures import PICTURE, draw_maps
from kdfast.experiments.distill.plan import Plan, Setting
from kdfast.methods.diffkd import DiffKD, DiffKDConfig, activation_memory, saliency

CONFIG = DiffKDConfig
METHOD = DiffKD
NEEDS_DATA = True

_CAPTION = (
    "Held-out images, and where the feature is strong (H·W·softmax of the mean over channels, τ = 0.5): the "
    "student's, the student's denoised, the teacher's. Each map in its own range."
)


def build(setting: Setting) -> Plan:
    """The student and the method's own networks, under one step.

    Raises:
        ConfigError: A layer or a combination of fields that the networks do not allow.
    """
    size = setting.described.image_size
    images = torch.zeros(2, 3, size, size, device=setting.accelerator.device)
    try:
        model = DiffKD(setting.student, setting.teacher, config=setting.method, images=images)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    pictured = "feature" in model.names and setting.config.test_data is not None

    def facts() -> dict[str, Any]:
        kept = activation_memory(model, images) // len(images)
        captions = {"captions": {PICTURE: _CAPTION}} if pictured else {}
        return {"nfe": setting.method.steps, "activation_bytes_per_image": kept, **captions}

    def leave(folder: Path) -> None:
        if pictured:
            draw(folder, model, setting)

    return Plan(
        model,
        lambda wrapped, batch: wrapped(*batch),
        student=lambda trained: trained.get_submodule("student"),
        facts=facts,
        leave=leave,
    )


def draw(folder: Path, model: DiffKD, setting: Setting) -> None:
    """Held-out images beside their maps before and after denoising, as in the paper's Figs. 2 and 5."""

    def maps(images: torch.Tensor) -> list[torch.Tensor]:
        found = model.maps(images)["feature"]
        return [saliency(found[name]) for name in ("student", "cleaned", "teacher")]

    draw_maps(folder, setting, maps)
