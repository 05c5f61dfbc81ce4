"""Distillation losses."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from kdfast.functional._checks import (
    check_factor,
    check_lam,
    check_number,
)
from kdfast.functional._reduction import Reduction, reduction_divisor
from kdfast.functional._rows import check_row_labels, check_rows
from kdfast.ops import kl as ops
from kdfast.ops.common.row_loss import Row
from kdfast.profiling import annotate
from kdfast.reference.common import compute_dtype

__all__ = ["KDStatistics", "Reduction", "distillation_loss", "kd_kl_div", "kd_statistics"]


@annotate("kd_kl_div")
def kd_kl_div(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    *,
    dim: int = -1,
    reduction: Reduction = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    divisor: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Temperature-scaled KL divergence from teacher to student, from logits, with both exact gradients.

        T² · Σ_rows w · Σ_c p_c (log p_c - log q_c) / D        p = softmax(t/T), q = softmax(s/T)

    (Hinton et al. 2015, Eq. 4.) The same value as ``F.kl_div(F.log_softmax(student/T, dim),
    F.softmax(teacher/T, dim), reduction=reduction) * T*T`` for the reductions ``sum``, ``mean`` and
    ``batchmean``, in one pass over the logits.

    Args:
        student: Logits, any shape and strides; float32, bfloat16, float16 or float64.
        teacher: Logits of the same shape on the same device; its dtype may differ.
        temperature: T > 0; a float, or a 0-d tensor (read on the device, so that it may change between
            replays of a CUDA graph). Gets no gradient.
        dim: The class dimension.
        reduction: ``"batchmean"`` divides the sum by ``student.size(0)``, ``"mean"`` by the number of
            elements, ``"sum"`` by 1, ``"rowmean"`` by the number of rows whose mask is True; ``"none"`` gives
            one value a row.
        row_weight: A factor a row, of the logits' shape without ``dim``. Gets no gradient.
        mask: bool of that shape; a row where it is False adds nothing and gets no gradient. Only the divisor
            of ``rowmean`` depends on it.
        divisor: Takes the place of the reduction's own divisor: a float, or a 0-d tensor on the logits' device
            (a count over all ranks, say; see :class:`kdfast.nn.KDLoss`). Gets no gradient.

    Returns:
        A 0-d tensor, or for ``"none"`` the logits' shape without ``dim``; float32, float64 when either input
        is. With every row masked it is 0, and so is the gradient.

    Raises:
        TypeError: Logits that are not floating point, a mask that is not bool.
        ValueError: Shapes, devices, ``dim``, ``temperature`` or ``reduction`` out of what is said above.

    Example:
        >>> loss = kd_kl_div(student_logits, teacher_logits, temperature=4.0)
        >>> loss.backward()
    """
    axis, temperature, row_weight, mask = check_rows(
        student, teacher, temperature, dim, reduction, row_weight, mask
    )
    if divisor is None:
        divisor = reduction_divisor(reduction, student, axis, mask)
    else:
        divisor = check_number("divisor", divisor, student, above=0.0)
    row = Row((), axis, temperature, row_weight, mask, divisor, reduction != "none")
    return ops.kl.run(student, teacher, row)


@annotate("distillation_loss")
def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    mixed_target: torch.Tensor | None = None,
    lam: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: Reduction = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Distillation and hard-label cross-entropy of the same student logits, in one pass over them.

    ``kd_weight`` · :func:`kd_kl_div` + ``ce_weight`` · cross-entropy (Hinton et al. 2015, section 2), where the
    cross-entropy is ``F.cross_entropy(student, target, label_smoothing=..., ignore_index=...)`` at temperature 1,
    averaged over the rows (for ``dim=1`` over the pixels) that are not ignored. With a mixed target (mixup, Zhang et
    al. 2018; CutMix, Yun et al. 2019) it is λ · CE(target) + (1 - λ) · CE(mixed_target), each averaged over its own
    rows.

    Args:
        student: Logits, any shape and strides; float32, bfloat16, float16 or float64.
        teacher: Logits of the same shape on the same device.
        target: int64 classes, of the logits' shape without ``dim``. Needed when ``ce_weight`` is not 0.
        temperature: T > 0 of the distillation term; a float or a 0-d tensor.
        kd_weight: Factor of the distillation term, ≥ 0.
        ce_weight: Factor of the cross-entropy, ≥ 0.
        label_smoothing: Share of the target spread evenly over the classes, 0 to 1.
        mixed_target: The other label of mixed samples, like ``target``; together with ``lam``.
        lam: λ, the share of ``target``, 0 to 1: a float, a 0-d tensor, or a tensor of one value a sample or a row.
        ignore_index: Rows with this target have no cross-entropy; their distillation term stays.
        dim: The class dimension.
        reduction: As in :func:`kd_kl_div` for the distillation term. The cross-entropy is averaged for
            ``"batchmean"``, ``"mean"`` and ``"rowmean"`` (which leaves masked rows out of the count), summed for
            ``"sum"``, and one value a row for ``"none"``.
        row_weight: A factor a row, of both terms.
        mask: bool; a row where it is False adds nothing to either term and gets no gradient.

    Returns:
        A 0-d tensor, or for ``"none"`` one value a row; float32, float64 when either input is. Where every row is
        ignored the cross-entropy is 0 (``F.cross_entropy`` has NaN).

    Raises:
        TypeError: Logits that are not floating point, targets that are not int64, a mask that is not bool.
        ValueError: A missing ``target`` or ``lam``; shapes, devices, numbers out of what is said above; on the CPU
            also a target that is no class (on a GPU, where looking would wait for it, the loss is NaN).
    """
    axis, temperature, row_weight, mask = check_rows(
        student, teacher, temperature, dim, reduction, row_weight, mask
    )
    kd_weight, ce_weight = check_factor("kd_weight", kd_weight), check_factor("ce_weight", ce_weight)
    if check_factor("label_smoothing", label_smoothing) > 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}; 0 to 1 is needed")
    if (mixed_target is None) != (lam is None):
        given, missing = ("lam", "mixed_target") if mixed_target is None else ("mixed_target", "lam")
        raise ValueError(f"{missing}: got None; it is needed together with {given}")
    if target is None and (ce_weight or mixed_target is not None):
        raise ValueError("target: got None; it is needed when ce_weight is not 0 or mixed_target is given")
    target = check_row_labels("target", target, axis, ignore_index, student)
    share = None
    if lam is not None:
        mixed_target = check_row_labels("mixed_target", mixed_target, axis, ignore_index, student)
        rows = student.shape[:axis] + student.shape[axis + 1 :]
        share = check_lam(lam, rows, student, compute_dtype(student, teacher))

    divisor = reduction_divisor(reduction, student, axis, mask)
    if isinstance(divisor, torch.Tensor):
        divisor = divisor.to(compute_dtype(student, teacher))
    divisor = divisor / kd_weight if kd_weight else math.inf  # the factor is T² over this
    factors = axis, temperature, row_weight, mask, divisor, reduction != "none"
    if not ce_weight or target is None:
        return ops.kl.run(student, teacher, Row((), *factors))
    if mixed_target is None and ops.launches(student, teacher, ignore_index):  # the kernel finds the factors
        count, counted = None, 0.0
        if reduction not in ("sum", "none"):  # counted on the device: no host sync
            only = mask if reduction == "rowmean" else None
            counted = 2.0 if only is None and ops.is_counted(target) else 1.0
            if counted == 1.0:
                counts = target != ignore_index
                count = (counts if only is None else counts & only).sum(dtype=torch.float32)
        options = (float(label_smoothing), ce_weight, float(ignore_index), counted)
        return ops.distillation.launch(student, teacher, Row(options, *factors, target, count))
    dtype = compute_dtype(student, teacher)
    factor = label_factor(target, ignore_index, ce_weight, reduction, mask, dtype)
    second = None
    if mixed_target is not None and share is not None:
        second = label_factor(mixed_target, ignore_index, ce_weight, reduction, mask, dtype) * (1 - share)
        factor = factor * share
        second, mixed_target = second.contiguous(), mixed_target.contiguous()
    labels = target.contiguous(), factor.contiguous(), mixed_target, second
    return ops.distillation.run(student, teacher, Row((float(label_smoothing),), *factors, *labels))


class KDStatistics(NamedTuple):
    """What :func:`kd_statistics` returns; each has the logits' shape without the class dimension.

    Attributes:
        kl: KL(teacher ‖ student) at T, without the factor T²; float32 (float64 for float64 inputs).
        teacher_class: The teacher's class, the first of equals; int64.
        teacher_prob: Its probability at T = 1; like ``kl``.
        agreement: Whether the student's class is the same; bool.
    """

    kl: torch.Tensor
    teacher_class: torch.Tensor
    teacher_prob: torch.Tensor
    agreement: torch.Tensor


@annotate("kd_statistics")
def kd_statistics(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    *,
    dim: int = -1,
) -> KDStatistics:
    """What prioritized replay needs of each sample, in one pass over the logits.

    Nothing of it carries a gradient: it decides what is learnt next, and is not itself a loss.

    Args:
        student: Logits, any shape and strides; float32, bfloat16, float16 or float64.
        teacher: Logits of the same shape on the same device.
        temperature: T > 0 of the divergence; a float or a 0-d tensor.
        dim: The class dimension.

    Returns:
        A :class:`KDStatistics`.

    Raises:
        TypeError: Logits that are not floating point.
        ValueError: Shapes, devices, ``dim`` or ``temperature`` that do not fit; no classes at all.
    """
    axis, temperature, _, _ = check_rows(student, teacher, temperature, dim, "none", None, None)
    if student.shape[axis] == 0:
        raise ValueError("student: has no classes; statistics need one at least")
    return KDStatistics(*ops.kd_statistics(student, teacher, temperature, axis))


def label_factor(
    target: torch.Tensor,
    ignore_index: int,
    weight: float,
    reduction: Reduction,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Each row's factor of the cross-entropy: weight over the count of rows, 0 where the row is ignored."""
    counts = target != ignore_index
    if reduction in ("sum", "none"):
        return counts.to(dtype) * weight
    counted = counts if reduction != "rowmean" or mask is None else counts & mask
    # Counted on the device: no host sync. At least 1, so that nothing to count means a loss of 0.
    return counts * (weight / counted.sum(dtype=dtype).clamp(min=1.0))
