"""Every divergence between teacher and student that people distil with, by one function."""

from __future__ import annotations

from typing import get_args

import torch

from kdfast.functional._checks import COLDEST, HOTTEST, check_between, check_temperature
from kdfast.functional._reduction import Reduction, reduction_divisor
from kdfast.functional._rows import check_rows
from kdfast.ops import kl
from kdfast.ops import pair as ops
from kdfast.ops.common.gradients import Value
from kdfast.ops.common.row_loss import Row
from kdfast.profiling import annotate
from kdfast.reference.pair import KINDS, Kind

__all__ = ["Kind", "divergence_loss"]

# Looked up once: both are on the way of every call.
_KINDS = get_args(Kind)
_NUMBERED = {kind: float(number) for number, kind in enumerate(KINDS)}


def check_kind(kind: str, alpha: float, beta: float) -> tuple[str, tuple[float, float]]:
    """The kind that a divergence is at the ends of its number, and (α, β), of which all but ``ab`` have one: β."""
    if type(kind) is str and kind == "alpha" and type(alpha) is float and 0.01 <= alpha <= 0.99:
        return kind, (0.0, alpha)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"kind: got {kind!r}; accepted: {', '.join(_KINDS)}")
    if kind == "ab":
        return kind, (check_between("alpha", alpha, 0.05, 2.0), check_between("beta", beta, 0.05, 2.0))
    number = 0.0
    if kind == "jsd":
        number = check_between("beta", beta, 0.0, 1.0)
        kind = ("forward_kl", "reverse_kl")[int(number)] if number in (0.0, 1.0) else kind
    elif kind.startswith("skew"):
        number = check_between("alpha", alpha, 0.0, 0.99)
        kind = kind.removeprefix("skew_") if number == 0.0 else kind
    elif kind == "alpha":
        number = check_between("alpha", alpha, -1.0, 2.0)
        if number in (0.0, 1.0):
            kind = ("reverse_kl", "forward_kl")[int(number)]
        elif min(abs(number), abs(number - 1)) < 0.01:
            raise ValueError(
                f"alpha: got {number}; 0, 1, or a value at least 0.01 away from both is needed: nearer, the divergence "
                "cancels in float32, and it is the KL divergence there"
            )
    return kind, (0.0, number)


def check_ratio(
    temperature: Value, teacher_temperature: float | torch.Tensor | None, logits: torch.Tensor
) -> tuple[float, torch.Tensor | None]:
    """The student's temperature over the teacher's, as a float or as a 0-d tensor on the device."""
    if teacher_temperature is None:
        return 1.0, None
    if (
        type(temperature) is type(teacher_temperature) is float
        and COLDEST <= teacher_temperature <= HOTTEST
        and not torch.compiler.is_compiling()  # which calls a number that it does not know a float, too
    ):
        return temperature / teacher_temperature, None
    try:
        own = check_temperature(teacher_temperature, logits)
    except (TypeError, ValueError) as error:
        raise type(error)(f"teacher_{error}") from None
    ratio = temperature / own
    return (1.0, ratio) if isinstance(ratio, torch.Tensor) else (ratio, None)


@annotate("divergence_loss")
def divergence_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    kind: Kind = "forward_kl",
    temperature: float | torch.Tensor = 1.0,
    teacher_temperature: float | torch.Tensor | None = None,
    beta: float = 0.5,
    alpha: float = 0.5,
    dim: int = -1,
    reduction: Reduction = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""A divergence D between teacher and student, from logits, in one pass, with both exact gradients.

    .. math:: T^2 \sum_{rows} w\,D(p, q) / divisor,\quad p = \mathrm{softmax}(t/T_t),\ q = \mathrm{softmax}(s/T)

    ===================  ====================================================================================
    ``kind``             D(p, q)
    ===================  ====================================================================================
    ``forward_kl``       KL(p ‖ q): :func:`kd_kl_div` (Hinton et al. 2015)
    ``reverse_kl``       KL(q ‖ p) (MiniLLM, Gu et al. 2024)
    ``jeffreys``         KL(p ‖ q) + KL(q ‖ p) (Jeffreys 1946)
    ``jsd``              β·KL(p ‖ m) + (1-β)·KL(q ‖ m), m = β·p + (1-β)·q (GKD, Agarwal et al. 2024, Eq. 1); 0 and 1 are
                         the KLs forward and reverse: :func:`jsd_loss`
    ``skew_forward_kl``  KL(p ‖ α·p + (1-α)·q) (DistiLLM, Ko et al. 2024, Eq. 4, with α = 0.1)
    ``skew_reverse_kl``  KL(q ‖ (1-α)·p + α·q) (the same, Eq. 5)
    ``total_variation``  ½ Σ |p - q|
    ``alpha``            (Σ p^α·q^(1-α) - 1)/(α·(α-1)) (Cichocki & Amari 2010); 1 is the forward KL, 0 the reverse, ½
                         four times the squared Hellinger distance, 2 half of Pearson's χ²
    ``triangular``       Σ (p - q)²/(p + q): triangular discrimination (Topsøe 2000)
    ``ab``               Σ (α·p^λ/λ + β·q^λ/λ - p^α·q^β)/(α·β), λ = α + β: AB-divergence (Cichocki, Cruces & Amari 2011;
                         ABKD, Wang et al. 2025)
    ===================  ====================================================================================

    TRL's and Liger's ``beta`` are this one. They have no factor T²: divide by T² for their value. Terms are summed in a
    form that keeps its digits where student and teacher nearly agree.

    Args:
        student: Logits, any shape and strides; float32, bfloat16, float16 or float64.
        teacher: Logits of the same shape on the same device; its dtype may differ.
        kind: One of the above.
        temperature: T > 0; a float, or a 0-d tensor (read on the device). Gets no gradient.
        teacher_temperature: T_t of the teacher; None: T. The factor stays T², that of the student's.
        beta: β of ``jsd``, 0 to 1, or of ``ab``, 0.05 to 2.
        alpha: α of the skew divergences, 0 to 0.99, of ``alpha``, -1 to 2, or of ``ab``, 0.05 to 2.
        dim: The class dimension.
        reduction: As in :func:`kd_kl_div`.
        row_weight: A factor a row, of the logits' shape without ``dim``. Gets no gradient.
        mask: bool of that shape; a row where it is False adds nothing and gets no gradient.

    Returns:
        A 0-d tensor, or for ``"none"`` the logits' shape without ``dim``; float32, float64 when either input is. A
        class that one side rules out (-inf) makes D infinite where the definition does; ruled out by both, nothing.

    Raises:
        TypeError: Logits that are not floating point, a mask that is not bool, a number that is none.
        ValueError: ``kind``, shapes, devices, ``dim``, temperatures, ``alpha``, ``beta`` or ``reduction`` out of what
            is said above.

    Example:
        >>> loss = divergence_loss(student_logits, teacher_logits, kind="skew_reverse_kl", alpha=0.1)
    """
    kind_, numbers = check_kind(kind, alpha, beta)
    axis, temperature, row_weight, mask = check_rows(
        student, teacher, temperature, dim, reduction, row_weight, mask
    )
    ratio, ratio_tensor = check_ratio(temperature, teacher_temperature, student)
    divisor = reduction_divisor(reduction, student, axis, mask)
    factors = axis, temperature, row_weight, mask, divisor, reduction != "none"
    if ratio == 1.0 and ratio_tensor is None:
        if kind_ in ("forward_kl", "reverse_kl"):
            first, second = (student, teacher) if kind_ == "forward_kl" else (teacher, student)
            return kl.kl.run(first, second, Row((), *factors))
        if kind_ == "jsd":
            return ops.jsd.run(student, teacher, Row(numbers, *factors))
    options = (_NUMBERED[kind_], *numbers, ratio)
    return ops.divergence.run(student, teacher, Row(options, *factors, factor=ratio_tensor))
