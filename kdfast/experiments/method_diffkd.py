"""``method: diffkd``: features and logits, denoised before they are compared."""

from __future__ import annotations

from typing import Any

import torch

from kdfast.errors import ConfigError
from kdfast.experiments.methods import Plan, Setting
from kdfast.methods.diffkd import DiffKD, DiffKDConfig, activation_memory

CONFIG = DiffKDConfig
METHOD = DiffKD
NEEDS_DATA = True


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

    def facts() -> dict[str, Any]:
        return {
            "nfe": setting.method.steps,
            "activation_bytes_per_image": activation_memory(model, images) // len(images),
        }

    return Plan(
        model, lambda wrapped, batch: wrapped(*batch), student=lambda trained: trained.student, facts=facts
    )
