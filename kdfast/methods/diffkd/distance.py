"""How a cleaned feature is compared with the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.functional import dist_loss, kd_kl_div
from kdfast.methods.diffkd.config import DiffKDConfig, Distance

__all__ = ["attention", "distance"]


def distance(
    kind: Distance, student: Tensor, teacher: Tensor, config: DiffKDConfig, weight: Tensor | None = None
) -> Tensor:
    """d(student, teacher) of maps ``[B, C, H, W]``, a 0-d tensor of at least float32.

    ``mse`` and ``l1`` are means over all elements. ``kl`` (times τ²) and ``dist`` compare classes, at each place of a
    dense map, and are means over samples and places; so is ``sigmoid``, the divergence of classes that are each
    yes or no (times τ²), summed over them. The teacher gets no gradient.

    Args:
        kind: Which.
        student: In any floating point.
        teacher: Of the same shape.
        config: Temperatures, and DIST's weights.
        weight: ``[B, 1, H, W]``, how much each place counts: means are weighted, and 0 if nothing counts.

    Raises:
        ValueError: ``dist`` with a weight.
    """
    if kind == "dist":
        if weight is not None:
            raise ValueError(
                "foreground: got a mask for distance='dist', which correlates all places; accepted: mse, "
                "attention_mse, l1, kl, sigmoid"
            )
        return dist_loss(
            student,
            teacher,
            beta=config.dist_beta,
            gamma=config.dist_gamma,
            temperature=config.temperature,
            dim=1,
        )
    if kind == "kl":
        if weight is None:
            return kd_kl_div(student, teacher, config.temperature, dim=1, reduction="rowmean")
        rows = kd_kl_div(student, teacher, config.temperature, dim=1, reduction="none")
        return _mean(rows.unsqueeze(1), weight)
    own = student.double() if student.dtype == torch.float64 else student.float()
    if kind == "sigmoid":
        return _mean(_bernoulli(own, teacher, config.temperature), weight)
    gap = own.sub(teacher)
    errors = gap.abs() if kind == "l1" else gap.square()
    if kind == "attention_mse":
        errors = errors * attention(teacher, config.attention_temperature)
    return _mean(errors, weight)


def _mean(errors: Tensor, weight: Tensor | None) -> Tensor:
    """Of ``[B, C, H, W]``, weighted by place."""
    if weight is None:
        return errors.mean()
    weight = weight.to(errors.dtype)
    total = weight.sum() * errors.shape[1]
    return (errors * weight).sum() / total.clamp_min(torch.finfo(errors.dtype).tiny)


def _bernoulli(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """τ²·Σ_c KL(σ(t/τ) ‖ σ(s/τ)), ``[B, 1, H, W]``: of detectors' scores, where each class is a question of its own."""
    own, other = student / temperature, teacher.to(student.dtype) / temperature
    yes = other.sigmoid() * (F.logsigmoid(other) - F.logsigmoid(own))
    no = (-other).sigmoid() * (F.logsigmoid(-other) - F.logsigmoid(-own))
    return (yes + no).sum(1, keepdim=True) * temperature**2


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
