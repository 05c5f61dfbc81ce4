"""A picture of features beside the images that they are of, for the report of a method that compares features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.errors import require
from kdfast.experiments.common.image_batches import ImageBatches
from kdfast.experiments.common.results import held_out
from kdfast.experiments.distill.plan import Setting
from kdfast.methods.kdiffusion import Kdiffusion
from kdfast.report import write_grid

PICTURE = "samples-features.png"
CAPTION = (
    "Held-out images, and the mean size of the last stage's feature over its channels: one branch's, the mean of all "
    "branches', the teacher's. Each map in its own range."
)
_ROWS = 8

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def draw(folder: Path, method: Kdiffusion, setting: Setting) -> None:
    """Write :data:`PICTURE`: for some held-out images a branch, the branches' mean and the teacher."""
    described, config = setting.described, setting.config
    data = held_out(config.test_data, described, config.label_column, task=config.task)
    if data is None:
        return
    batches = ImageBatches(data, _ROWS, mean=described.mean, std=described.std, shuffle=False)
    images, _ = next(iter(batches))
    branches, teacher = method.maps(images.to(setting.accelerator.device))[method.stages[-1].op]
    if teacher.dim() != 4:
        return  # vectors have no map
    columns = [_pixels(images, described.mean, described.std)]
    columns += [_heat(feature, images.shape[-1]) for feature in (branches[0], branches.mean(0), teacher)]
    tiles = np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])
    write_grid(folder / PICTURE, tiles, columns=2 * len(columns), scale=max(1, 96 // images.shape[-1]))


def _pixels(images: Tensor, mean: Any, std: Any) -> Pixels:
    """Normalised images as uint8 ``[N, 3, H, W]``."""
    shape = (1, len(mean), 1, 1)
    plain = images.cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    found: Pixels = plain.mul(255).round().clamp(0, 255).byte().numpy()
    return found


def _heat(feature: Tensor, size: int) -> Pixels:
    """A feature ``[N, C, h, w]`` in colour, uint8 ``[N, 3, size, size]``; its pixels stay squares."""
    matplotlib = require("matplotlib", extra="report", feature="pictures of features")
    maps = feature.float().abs().mean(1).cpu()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    shares = F.interpolate(((maps - low) / (high - low).clamp_min(1e-12))[:, None], size=(size, size))[:, 0]
    colours = matplotlib.colormaps["viridis"](shares.numpy(), bytes=True)[..., :3]
    found: Pixels = np.ascontiguousarray(colours.transpose(0, 3, 1, 2))
    return found
