"""The modulating function of SSD-KD."""

from __future__ import annotations

import torch

#: 1 − p is kept from 0, where a power below 1 would have no gradient.
FLOOR = 1e-6


def modulation(
    teacher_prob: torch.Tensor,
    teacher_class: torch.Tensor,
    class_counts: torch.Tensor,
    size: int | torch.Tensor,
    gamma: float,
) -> torch.Tensor:
    """φ of SSD-KD, Eq. 3: rare classes and hard samples weigh more.

        φ(x) = (1 - n_c(x) / |B|) · (1 - p_T(x))^γ

    Args:
        teacher_prob: The teacher's probability of its prediction, any floating dtype and shape (``[n]``, or
            per pixel ``[n, H, W]``). φ is differentiable in it; 1 − p is clamped to at least 1e-6.
        teacher_class: The predicted classes, int64, of the same shape.
        class_counts: Rows of the buffer by class, ``[num_classes]`` (``buffer.class_counts()``). Constant: no
            gradient.
        size: Rows in the buffer, |B|; an int or a 0-d tensor. With 0 the first factor is 1.
        gamma: γ ≥ 0.

    Returns:
        φ, of ``teacher_prob``'s shape and dtype.

    Raises:
        TypeError: ``teacher_prob`` is not floating point, or ``teacher_class`` no integers.
        ValueError: Shapes differ, γ is negative, or (on a CPU, where it can be seen without waiting) a class is
            not in ``class_counts``.
    """
    if not teacher_prob.is_floating_point():
        raise TypeError(f"teacher_prob: got {teacher_prob.dtype}, accepted: a floating dtype")
    if teacher_class.is_floating_point() or teacher_class.is_complex() or teacher_class.dtype == torch.bool:
        raise TypeError(f"teacher_class: got {teacher_class.dtype}, accepted: an integer dtype")
    if teacher_prob.shape != teacher_class.shape:
        raise ValueError(
            f"teacher_class: got shape {tuple(teacher_class.shape)}, accepted: that of teacher_prob, "
            f"{tuple(teacher_prob.shape)}"
        )
    if class_counts.dim() != 1:
        raise ValueError(f"class_counts: got shape {tuple(class_counts.shape)}, accepted: [num_classes]")
    if not gamma >= 0:
        raise ValueError(f"gamma: got {gamma}, accepted: at least 0")
    if isinstance(size, int) and size < 0:
        raise ValueError(f"size: got {size}, accepted: at least 0")
    teacher_class = teacher_class.long()
    if teacher_class.device.type == "cpu" and teacher_class.numel():
        low, high = int(teacher_class.min()), int(teacher_class.max())
        if low < 0 or high >= class_counts.numel():
            raise ValueError(
                f"teacher_class: got {low if low < 0 else high}, accepted: 0 to {class_counts.numel() - 1}"
            )
    counts = class_counts.detach()[teacher_class].to(teacher_prob.dtype)
    # An empty buffer has no counts either: 0 / 1.
    divisor = max(size, 1) if isinstance(size, int) else size.clamp(min=1).to(teacher_prob.dtype)
    return (1 - counts / divisor) * (1 - teacher_prob).clamp(min=FLOOR) ** gamma
