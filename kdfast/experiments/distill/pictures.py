"""Pictures of features beside the images that they are of, for the report of a method that compares features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.errors import require
from kdfast.experiments.common.held_out import held_out, splits_itself
from kdfast.experiments.common.image_batches import ImageBatches
from kdfast.experiments.distill.plan import Setting
from kdfast.report import write_grid

PICTURE = "samples-features.png"
_ROWS = 8
_ABREAST = 2  # images with their maps side by side

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def draw_maps(folder: Path, setting: Setting, maps_of: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Write :data:`PICTURE`: held-out images, and beside each its maps.

    Args:
        folder: The result directory.
        setting: Where the images come from, and how they are normalised.
        maps_of: From normalised images ``[N, C, H, W]`` on the device to maps ``[N, h, w]``, as many for every image;
            none, and nothing is drawn.
    """
    described, config = setting.described, setting.config
    whole = not splits_itself(config.data, config.test_data)
    data = held_out(config.test_data, described, config.label_column, task=config.task, whole=whole)
    if data is None:
        return
    batches = ImageBatches(data, _ROWS, mean=described.mean, std=described.std, shuffle=False)
    images, _ = next(iter(batches))
    maps = maps_of(images.to(setting.accelerator.device))
    if not maps:
        return
    columns = [_pixels(images, described.mean, described.std)]
    columns += [_heat(each.float().cpu(), images.shape[-1]) for each in maps]
    tiles = np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])
    scale = max(1, 96 // images.shape[-1])
    write_grid(folder / PICTURE, tiles, columns=_ABREAST * len(columns), scale=scale)


def _pixels(images: Tensor, mean: Any, std: Any) -> Pixels:
    """Normalised images as uint8 ``[N, 3, H, W]``."""
    shape = (1, len(mean), 1, 1)
    plain = images.cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    found: Pixels = plain.mul(255).round().clamp(0, 255).byte().numpy()
    return found


def _heat(maps: Tensor, size: int) -> Pixels:
    """Maps ``[N, h, w]`` in colour, uint8 ``[N, 3, size, size]``; a feature's pixel stays one square."""
    matplotlib = require("matplotlib", extra="report", feature="pictures of features")
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    shares = F.interpolate(((maps - low) / (high - low).clamp_min(1e-12))[:, None], size=(size, size))[:, 0]
    colours = matplotlib.colormaps["viridis"](shares.numpy(), bytes=True)[..., :3]
    found: Pixels = np.ascontiguousarray(colours.transpose(0, 3, 1, 2))
    return found
