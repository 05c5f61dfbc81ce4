"""RandAugment on whole batches: each image draws its own operations, images of one operation are done
together.

Source: Cubuk et al. 2019. The fourteen operations, their ranges over 31 magnitude bins, nearest-neighbour
geometry with black corners and the random sign are torchvision's, in which the papers' experiments are
written. Images are float in [0, 1] rather than bytes, so results differ from it by the rounding of bytes that
does not happen here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from kdfast.constants import constant

BINS = 31
# Weights of the luma of ITU-R BT.601, as Pillow's grey.
_GREY = (0.299, 0.587, 0.114)


def rand_augment(
    images: torch.Tensor, generator: torch.Generator, *, n: int = 2, magnitude: int = 9
) -> torch.Tensor:
    """Apply ``n`` operations, drawn for each image out of fourteen, one after the other.

    Args:
        images: Floating point ``[B, 3, H, W]`` in [0, 1].
        generator: On the images' device; it is not waited for.
        n: Operations an image.
        magnitude: Bin from 0 to 30.

    Raises:
        TypeError: ``images`` are not floating point.
        ValueError: A shape or number is out of range.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: got shape {list(images.shape)}; must be [B, 3, H, W]")
    if not images.is_floating_point():
        raise TypeError(f"images: got {images.dtype}; must be floating point")
    if n < 0:
        raise ValueError(f"n: got {n}; must be at least 0")
    if not 0 <= magnitude < BINS:
        raise ValueError(f"magnitude: got {magnitude}; must be in 0 to {BINS - 1}")
    host = host_generator(generator)
    operations = list(OPERATIONS.values())
    for _ in range(n):
        choice = torch.randint(len(operations), (len(images),), generator=host)
        sign = torch.randint(2, (len(images),), generator=host) * 2.0 - 1
        result = images.clone()
        for number, operation in enumerate(operations):
            rows = (choice == number).nonzero().squeeze(1)
            if number and len(rows):  # operation 0 is to do nothing
                there = rows.to(images.device, non_blocking=True)
                signs = sign[rows].to(images.device, images.dtype, non_blocking=True)
                result[there] = operation(images[there], magnitude / (BINS - 1), signs)
        images = result
    return images


def host_generator(generator: torch.Generator) -> torch.Generator:
    """A generator on the CPU that follows from the state of one on any device, which it moves on.

    Which image gets which operation is decided on the host. Drawing that on the device would mean waiting for
    it, and with it for the training steps queued there; a generator's state is known on the host without.
    """
    digest = hashlib.blake2b(generator.get_state().numpy().tobytes(), digest_size=8).digest()
    torch.rand(1, generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


Operation = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]


def affine(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Sample each image at ``matrix`` of its output pixels, measured in pixels from its centre; black
    outside.

    Args:
        images: ``[B, C, H, W]``.
        matrix: ``[B, 2, 3]``, from output ``(x, y, 1)`` to input ``(x, y)``.
    """
    height, width = images.shape[-2:]
    # affine_grid counts in halves of each side.
    size = constant((width / 2, height / 2), images.device)
    matrix = matrix.float()
    theta = torch.cat([matrix[:, :, :2] * size / size[:, None], matrix[:, :, 2:] / size[:, None]], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    sampled = F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)
    return sampled.to(images.dtype)


def _geometric(
    cells: Callable[[torch.Tensor, int, int], dict[tuple[int, int], torch.Tensor]], most: float
) -> Operation:
    def operation(images: torch.Tensor, strength: float, sign: torch.Tensor) -> torch.Tensor:
        matrix = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
        for (row, column), value in cells(strength * most * sign.float(), *images.shape[-2:]).items():
            matrix[:, row, column] = value
        return affine(images, matrix)

    return operation


def _turn(degrees: torch.Tensor, height: int, width: int) -> dict[tuple[int, int], torch.Tensor]:
    angle = degrees * (math.pi / 180)
    # Counter-clockwise on the screen for positive angles, whose y points down.
    return {(0, 0): angle.cos(), (0, 1): -angle.sin(), (1, 0): angle.sin(), (1, 1): angle.cos()}


def _blended(plain: Callable[[torch.Tensor], torch.Tensor]) -> Operation:
    """Blend with a plainer version of the image, or away from it: factor 1 ± 0.9 · strength."""

    def operation(images: torch.Tensor, strength: float, sign: torch.Tensor) -> torch.Tensor:
        factor = (1 + 0.9 * strength * sign)[:, None, None, None]
        base = plain(images)
        return (base + factor * (images - base)).clamp(0, 1)

    return operation


def grey(images: torch.Tensor) -> torch.Tensor:
    """Luma, ``[B, 1, H, W]``."""
    weights = constant(_GREY, images.device, images.dtype)
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def smooth(images: torch.Tensor) -> torch.Tensor:
    """Average over 3×3 with a heavier middle (5 of 13); the border stays as it is."""
    kernel = torch.ones(3, 3, device=images.device, dtype=images.dtype)
    kernel[1, 1] = 5
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 3, 3)
    result = images.clone()
    if min(images.shape[-2:]) > 2:
        result[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel, groups=images.shape[1])
    return result


def _posterize(images: torch.Tensor, strength: float, sign: torch.Tensor) -> torch.Tensor:
    # The low bits of each byte, up to four of them.
    step = 1 << round(4 * strength)
    return ((images * 255).round().div(step).floor() * step / 255).to(images.dtype)


def _solarize(images: torch.Tensor, strength: float, sign: torch.Tensor) -> torch.Tensor:
    return torch.where(images >= 1 - strength, 1 - images, images)


def autocontrast(images: torch.Tensor) -> torch.Tensor:
    """Stretch each channel of each image to [0, 1]; a constant one stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (images - low) / span.clamp_min(1e-12), images)


def equalize(images: torch.Tensor) -> torch.Tensor:
    """Flatten each channel's histogram of 256 levels, with Pillow's integer rule."""
    batch, channels, height, width = images.shape
    levels = (images * 255).round().long().clamp(0, 255).view(batch * channels, -1)
    histogram = torch.zeros(batch * channels, 256, device=images.device, dtype=torch.int64)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))
    # Pillow's step: all pixels but those of the highest level that occurs, over 255.
    ranks = torch.arange(256, device=images.device)
    highest = (histogram > 0).long().mul(ranks).amax(1, keepdim=True)
    step = (height * width - histogram.gather(1, highest)) // 255
    before = histogram.cumsum(1) - histogram
    table = (step // 2 + before).div(step.clamp_min(1), rounding_mode="floor").clamp(max=255)
    table = torch.where(step > 0, table, ranks)
    return (table.gather(1, levels).view_as(images) / 255).to(images.dtype)


def _unconditional(function: Callable[[torch.Tensor], torch.Tensor]) -> Operation:
    return lambda images, strength, sign: function(images)


OPERATIONS: dict[str, Operation] = {
    # Shears are about the top left corner, as Pillow's and torchvision's.
    "identity": _unconditional(lambda images: images),
    "shear_x": _geometric(lambda v, h, w: {(0, 1): v, (0, 2): v * h / 2}, 0.3),
    "shear_y": _geometric(lambda v, h, w: {(1, 0): v, (1, 2): v * w / 2}, 0.3),
    "translate_x": _geometric(lambda v, h, w: {(0, 2): (v * w).trunc()}, 150 / 331),
    "translate_y": _geometric(lambda v, h, w: {(1, 2): (v * h).trunc()}, 150 / 331),
    "rotate": _geometric(_turn, 30.0),
    "brightness": _blended(torch.zeros_like),
    "color": _blended(grey),
    "contrast": _blended(lambda images: grey(images).mean((1, 2, 3), keepdim=True)),
    "sharpness": _blended(smooth),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _unconditional(autocontrast),
    "equalize": _unconditional(equalize),
}
