"""The kin of the KL loss: generalised Jensen-Shannon divergence and decoupled KD."""

from __future__ import annotations

import math
from typing import get_args

import torch

from kdfast.functional._checks import check_dim, check_logits, check_rowwise, check_temperature
from kdfast.functional.losses import Reduction, _divisor
from kdfast.ops import losses as _losses
from kdfast.ops import losses_more as _more

__all__ = ["dkd_loss", "jsd_loss"]


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
    beta = _number("beta", beta)
    if beta > 1:
        raise ValueError(f"beta: got {beta}; a value from 0 to 1 is needed")
    axis, rows = _check_pair(student, teacher, dim, reduction)
    temperature = check_temperature(temperature, student)
    row_weight = check_rowwise("row_weight", row_weight, rows, student)
    mask = check_rowwise("mask", mask, rows, student)
    divisor = _divisor(reduction, student, rows, mask)
    reduce = reduction != "none"
    if beta in (0.0, 1.0):
        first, second = (student, teacher) if beta == 0.0 else (teacher, student)
        return _losses.kd_kl(first, second, temperature, axis, row_weight, mask, divisor, reduce)
    row = _more.Row(None, None, (0.0, beta), axis, temperature, row_weight, mask, divisor, reduce)
    return _more.jsd(student, teacher, row)


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
    alpha, beta = _number("alpha", alpha), _number("beta", beta)
    axis, rows = _check_pair(student, teacher, dim, reduction)
    if student.shape[axis] < 2:
        raise ValueError(f"student: got {student.shape[axis]} class; decoupled KD needs at least 2")
    temperature = check_temperature(temperature, student)
    row_weight = check_rowwise("row_weight", row_weight, rows, student)
    mask = check_rowwise("mask", mask, rows, student)
    counted = _check_target(target, ignore_index, rows, student, axis)
    mask = counted if mask is None else mask & counted
    divisor = _divisor(reduction, student, rows, mask)
    safe = target.masked_fill(~counted, 0)
    row = _more.Row(
        safe, None, (alpha, beta), axis, temperature, row_weight, mask, divisor, reduction != "none"
    )
    return _more.dkd(student, teacher, row)


def _number(name: str, value: float) -> float:
    """A finite float that is not negative."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}; a number is needed")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: got {value}; a finite value of at least 0 is needed")
    return float(value)


def _check_pair(
    student: torch.Tensor, teacher: torch.Tensor, dim: int, reduction: Reduction
) -> tuple[int, torch.Size]:
    """The class dimension as a non-negative index, and the logits' shape without it."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: got {reduction!r}; accepted: {', '.join(get_args(Reduction))}")
    check_logits(student, teacher)
    axis = check_dim(dim, student)
    return axis, student.shape[:axis] + student.shape[axis + 1 :]


def _check_target(
    target: torch.Tensor, ignore_index: int, rows: torch.Size, logits: torch.Tensor, axis: int
) -> torch.Tensor:
    """Which rows have a target that is not ignored."""
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"target: got {type(target).__name__}; a tensor is needed")
    if target.dtype != torch.int64:
        raise TypeError(f"target: got dtype {target.dtype}; int64 class indices are needed")
    if target.shape != rows:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}; {tuple(rows)} is needed, the logits' without the class dimension"
        )
    if target.device != logits.device:
        raise ValueError(f"target: is on {target.device}; the logits are on {logits.device}")
    counted = target != ignore_index
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = counted & ((target < 0) | (target >= logits.shape[axis]))
        if bool(wrong.any()):
            raise ValueError(
                f"target: got class {int(target[wrong][0])}; accepted: 0 to {logits.shape[axis] - 1}, "
                f"or ignore_index={ignore_index}"
            )
    return counted
