"""Losses of two logit tensors beside the KL divergence: generalised Jensen-Shannon, decoupled KD."""

from __future__ import annotations

import torch

from kdfast.functional._checks import check_factor
from kdfast.functional._reduction import Reduction, reduction_divisor
from kdfast.functional._rows import check_row_labels, check_rows
from kdfast.ops import kl
from kdfast.ops import pair as ops
from kdfast.ops.common.row_loss import Row
from kdfast.profiling import annotate

__all__ = ["dkd_loss", "jsd_loss"]


@annotate("jsd_loss")
def jsd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    beta: float = 0.5,
    temperature: float | torch.Tensor = 1.0,
    dim: int = -1,
    reduction: Reduction = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Generalised Jensen-Shannon divergence between teacher and student, from logits.

    .. math:: T^2 \sum_{rows} w\,[\beta\,KL(p \| m) + (1 - \beta)\,KL(q \| m)] / D,
              \quad m = \beta p + (1 - \beta) q,\ p = \mathrm{softmax}(t/T),\ q = \mathrm{softmax}(s/T)

    (Agarwal et al. 2024, "On-policy distillation of language models", Eq. 1.) As there, ``beta=0`` is
    KL(teacher ‖ student), the same as :func:`kd_kl_div`, and ``beta=1`` is KL(student ‖ teacher). Those two are
    the limits of the divergence over β·(1-β): close to them, but not at them, it is about β or 1-β times as
    large.

    The factor T² keeps the gradient's size as T changes, as everywhere in kdfast. TRL's and Liger's JSD have
    none: divide by T² for their value (at T = 1 it is the same).

    Args:
        student: Logits, any shape and strides; float32, bfloat16, float16 or float64.
        teacher: Logits of the same shape on the same device; its dtype may differ.
        beta: β in [0, 1], the teacher's share of the mixture.
        temperature: T > 0; a float, or a 0-d tensor (read on the device). Gets no gradient.
        dim: The class dimension.
        reduction: As in :func:`kd_kl_div`.
        row_weight: A factor a row, of the logits' shape without ``dim``. Gets no gradient.
        mask: bool of that shape; a row where it is False adds nothing and gets no gradient.

    Returns:
        A 0-d tensor, or for ``"none"`` the logits' shape without ``dim``; float32, float64 when either input
        is. Both logits get exact gradients.

    Raises:
        TypeError: Logits that are not floating point, a mask that is not bool, a beta that is no number.
        ValueError: Shapes, devices, ``dim``, ``temperature``, ``beta`` or ``reduction`` out of what is said
            above.
    """
    beta = check_factor("beta", beta)
    if beta > 1:
        raise ValueError(f"beta: got {beta}; a value from 0 to 1 is needed")
    axis, temperature, row_weight, mask = check_rows(
        student, teacher, temperature, dim, reduction, row_weight, mask
    )
    divisor = reduction_divisor(reduction, student, axis, mask)
    factors = axis, temperature, row_weight, mask, divisor, reduction != "none"
    if beta in (0.0, 1.0):
        first, second = (student, teacher) if beta == 0.0 else (teacher, student)
        return kl.kl.run(first, second, Row((), *factors))
    return ops.jsd.run(student, teacher, Row((0.0, beta), *factors))


@annotate("dkd_loss")
def dkd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | torch.Tensor = 4.0,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: Reduction = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Decoupled knowledge distillation: the target class against the rest, and the rest among themselves.

    .. math:: T^2 \sum_{rows} w\,[\alpha\,KL(b_t \| b_s) + \beta\,KL(\hat p \| \hat q)] / D

    where b = (p_y, 1 - p_y) with y the target class, and p̂, q̂ are the softmaxes at T over the classes other
    than y (Zhao et al. 2022, "Decoupled knowledge distillation", Eq. 7). With α = 1 and β = 1 - p_y of the
    teacher, row by row, it would be :func:`kd_kl_div`. The defaults are the paper's for CIFAR-100.

    Args:
        student: Logits, any shape and strides; at least two classes; float32, bfloat16, float16 or float64.
        teacher: Logits of the same shape on the same device; its dtype may differ.
        target: int64 class indices, of the logits' shape without ``dim``. On the CPU an index out of range is
            refused; on a GPU, where looking would mean to wait, it is undefined.
        alpha: α ≥ 0, weight of the target-class part (TCKD).
        beta: β ≥ 0, weight of the non-target part (NCKD).
        temperature: T > 0; a float, or a 0-d tensor (read on the device). Gets no gradient.
        ignore_index: Rows with this target add nothing and get no gradient.
        dim: The class dimension.
        reduction: As in :func:`kd_kl_div`. ``rowmean`` leaves ignored rows out, the others do not.
        row_weight: A factor a row, of the logits' shape without ``dim``. Gets no gradient.
        mask: bool of that shape; a row where it is False adds nothing and gets no gradient.

    Returns:
        A 0-d tensor, or for ``"none"`` the logits' shape without ``dim``; float32, float64 when either input
        is. Both logits get exact gradients.

    Raises:
        TypeError: Logits that are not floating point, a target that is not int64, a mask that is not bool.
        ValueError: Shapes, devices, ``dim``, ``temperature``, ``alpha``, ``beta``, ``target`` or ``reduction``
            out of what is said above.
    """
    alpha, beta = check_factor("alpha", alpha), check_factor("beta", beta)
    axis, temperature, row_weight, mask = check_rows(
        student, teacher, temperature, dim, reduction, row_weight, mask
    )
    if student.size(axis) < 2:
        raise ValueError(f"student: got {student.size(axis)} class; decoupled KD needs at least 2")
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"target: got {type(target).__name__}; a tensor is needed")
    label = check_row_labels("target", target, axis, ignore_index, student)
    if reduction != "rowmean" and ops.launches(student, teacher, ignore_index):
        options = (alpha, beta, float(ignore_index))
        divisor = reduction_divisor(reduction, student, axis, mask)
        row = Row(options, axis, temperature, row_weight, mask, divisor, reduction != "none", label)
        return ops.dkd.launch(student, teacher, row)
    row = Row((alpha, beta), axis, temperature, row_weight, mask, 1.0, reduction != "none", label)
    row = ops.without_ignored(row, ignore_index)
    row = row._replace(divisor=reduction_divisor(reduction, student, axis, row.mask))
    return ops.dkd.run(student, teacher, row)
