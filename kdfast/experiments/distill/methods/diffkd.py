"""``method: diffkd``: features and logits, denoised before they are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from kdfast.errors import ConfigError, require
from kdfast.experiments.common.image_batches import ImageBatches
from kdfast.experiments.common.results import held_out
from kdfast.experiments.distill.plan import Plan, Setting
from kdfast.methods.diffkd import DiffKD, DiffKDConfig, activation_memory, saliency
from kdfast.report import write_grid

CONFIG = DiffKDConfig
METHOD = DiffKD
NEEDS_DATA = True

PICTURE = "samples-features.png"
_CAPTION = (
    "Held-out images, and where the feature is strong (H·W·softmax of the mean over channels, τ = 0.5): the "
    "student's, the student's denoised, the teacher's. Each map in its own range."
)
_ROWS = 8


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
            draw(folder / PICTURE, model, setting)

    return Plan(
        model,
        lambda wrapped, batch: wrapped(*batch),
        student=lambda trained: trained.get_submodule("student"),
        facts=facts,
        leave=leave,
    )


def draw(path: Path, model: DiffKD, setting: Setting) -> None:
    """Held-out images beside their maps before and after denoising, as in the paper's Figs. 2 and 5."""
    described, config = setting.described, setting.config
    data = held_out(config.test_data, described, config.label_column, task=config.task)
    if data is None:
        return
    batches = ImageBatches(data, _ROWS, mean=described.mean, std=described.std, shuffle=False)
    images, _ = next(iter(batches))
    maps = model.maps(images.to(setting.accelerator.device))["feature"]
    columns = [_pixels(images, described.mean, described.std)]
    columns += [
        _heat(saliency(maps[name]).cpu(), images.shape[-1]) for name in ("student", "cleaned", "teacher")
    ]
    tiles = np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])
    write_grid(path, tiles, columns=8, scale=max(1, 96 // images.shape[-1]))


def _pixels(images: torch.Tensor, mean: Any, std: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Normalised images as uint8 ``[N, 3, H, W]``."""
    shape = (1, len(mean), 1, 1)
    plain = images.cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    found: np.ndarray[Any, np.dtype[np.uint8]] = plain.mul(255).round().clamp(0, 255).byte().numpy()
    return found


def _heat(maps: torch.Tensor, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Maps ``[N, h, w]`` in colour, uint8 ``[N, 3, size, size]``; a feature's pixel stays one square."""
    matplotlib = require("matplotlib", extra="report", feature="pictures of features")
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    shares = F.interpolate(((maps - low) / (high - low).clamp_min(1e-12))[:, None], size=(size, size))[:, 0]
    colours = matplotlib.colormaps["viridis"](shares.numpy(), bytes=True)[..., :3]
    found: np.ndarray[Any, np.dtype[np.uint8]] = np.ascontiguousarray(colours.transpose(0, 3, 1, 2))
    return found
