"""How a cleaned feature is compared with the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.functional import dist_loss, kd_kl_div
from kdfast.methods.diffkd.config import DiffKDConfig, Distance

__all__ = ["attention", "distance"]


def distance(kind: Distance, student: Tensor, teacher: Tensor, config: DiffKDConfig) -> Tensor:
    """d(student, teacher) of maps ``[B, C, H, W]``, a 0-d tensor of at least float32.

    ``mse`` is the mean over all elements. ``kl`` (times τ²) and ``dist`` compare classes, at each place of a dense map,
    and are means over samples and places. The teacher gets no gradient.
    """
    if kind == "kl":
        return kd_kl_div(student, teacher, config.temperature, dim=1, reduction="rowmean")
    if kind == "dist":
        return dist_loss(
            student,
            teacher,
            beta=config.dist_beta,
            gamma=config.dist_gamma,
            temperature=config.temperature,
            dim=1,
        )
    squares = (student.double() if student.dtype == torch.float64 else student.float()).sub(teacher).square()
    if kind == "attention_mse":
        squares = squares * attention(teacher, config.attention_temperature)
    return squares.mean()


def attention(feature: Tensor, temperature: float) -> Tensor:
    """Where and in which channels a teacher's feature is strong, ``[B, C, H, W]`` with mean about 1.

    The product of H·W·softmax(mean_c|f|/τ) and C·softmax(mean_hw|f|/τ), of FGD (Yang et al. 2022, Eqs. 2 to 5), by
    which the paper's † for detection is "inspired"; it gives no formula of its own.
    """
    size = feature.abs().float() if feature.dtype != torch.float64 else feature.abs()
    _, channels, height, width = feature.shape
    spatial = (size.mean(1, keepdim=True) / temperature).flatten(2).softmax(2) * (height * width)
    by_channel = (size.mean((2, 3), keepdim=True) / temperature).softmax(1) * channels
    return spatial.view(-1, 1, height, width) * by_channel
