"""What gives every synthetic image a number: a function of one's own, or a trained network."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from kdfast.errors import ConfigError
from kdfast.experiments.common.networks import THEIRS
from kdfast.experiments.common.teacher_view import Teacher
from kdfast.models.foreign import find_own, is_own

Scorer = Callable[[torch.Tensor, torch.Tensor], Any]


def load_scorer(name: str | None, device: torch.device, num_classes: int | None = None) -> Scorer | None:
    """What a recipe's ``scorer`` names.

    Args:
        name: ``MODULE:CALLABLE`` or ``FILE.py:CALLABLE``, taken as it is; or a trained network (a run's folder,
            ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``) for :class:`TeacherScore`.
        device: Where the network runs.
        num_classes: How many classes the images have, where that is known.

    Raises:
        ConfigError: There is no such thing, it cannot be called, or the network knows fewer classes.
        CheckpointError: The network cannot be read.
    """
    if name is None:
        return None
    if is_own(name):
        try:
            own: Scorer = find_own(name, "scorer")
            return own
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if name.startswith(tuple(THEIRS)) or Path(name).exists():
        return TeacherScore(Teacher.load(name, device), num_classes)
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(
            f"scorer: got {name!r}, accepted: module:callable, FILE.py:CALLABLE, or a trained network (a run's folder, "
            "timm:NAME, torchvision:NAME, hf:NAME)"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"scorer: got {name!r}, which cannot be imported: {error} (a file of yours is FILE.py:CALLABLE)"
        ) from error
    if not callable(found):
        raise ConfigError(f"scorer: got {name!r}, which is a {type(found).__name__} and not callable")
    return found  # type: ignore[no-any-return]


class TeacherScore:
    """The softmax that a classifier gives to the label that an image was made for: uint8 ``[B, 3, H, W]`` to ``[B]``.

    Images are resized until their short side is the network's, and cropped at the centre.

    Raises:
        ConfigError: The network knows fewer classes than the images have.
    """

    def __init__(self, teacher: Teacher, num_classes: int | None = None) -> None:
        if num_classes is not None and num_classes > teacher.num_classes:
            raise ConfigError(
                f"scorer: got {teacher.name} of {teacher.num_classes} classes, accepted: one that knows all "
                f"{num_classes} classes of the images"
            )
        self.teacher = teacher

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Probabilities, float32 on the CPU."""
        device, side = self.teacher.device, self.teacher.described.image_size
        pixels = images.to(device).float() / 255
        if pixels.shape[-2:] != (side, side):
            scale = side / min(pixels.shape[-2:])
            size = [max(side, round(extent * scale)) for extent in pixels.shape[-2:]]
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
            top, left = ((extent - side) // 2 for extent in size)
            pixels = pixels[..., top : top + side, left : left + side]
        probabilities = self.teacher(pixels).float().softmax(1)
        return probabilities.gather(1, labels.to(device)[:, None])[:, 0].cpu()
