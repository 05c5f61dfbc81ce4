"""The kin of the KL loss: generalised Jensen-Shannon divergence, decoupled KD, cached top-k teachers, DIST."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from kdfast.functional._checks import check_dim, check_logits, check_rowwise, check_temperature
from kdfast.functional.losses import Reduction, reduction_divisor
from kdfast.ops import losses as _losses
from kdfast.ops import losses_more as _more
from kdfast.profiling import annotate

__all__ = ["Tail", "dist_loss", "dkd_loss", "jsd_loss", "topk_kd_loss"]

Tail = Literal["bucket", "renormalize"]


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
    beta = _number("beta", beta)
    if beta > 1:
        raise ValueError(f"beta: got {beta}; a value from 0 to 1 is needed")
    axis, rows = _check_pair(student, teacher, dim, reduction)
    temperature = check_temperature(temperature, student)
    row_weight = check_rowwise("row_weight", row_weight, rows, student)
    mask = check_rowwise("mask", mask, rows, student)
    divisor = reduction_divisor(reduction, student, axis, mask)
    reduce = reduction != "none"
    if beta in (0.0, 1.0):
        first, second = (student, teacher) if beta == 0.0 else (teacher, student)
        return _losses.kd_kl(first, second, temperature, axis, row_weight, mask, divisor, reduce)
    row = _more.Row(None, None, (0.0, beta), axis, temperature, row_weight, mask, divisor, reduce)
    return _more.jsd(student, teacher, row)


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
    alpha, beta = _number("alpha", alpha), _number("beta", beta)
    axis, rows = _check_pair(student, teacher, dim, reduction)
    if student.shape[axis] < 2:
        raise ValueError(f"student: got {student.shape[axis]} class; decoupled KD needs at least 2")
    temperature = check_temperature(temperature, student)
    row_weight = check_rowwise("row_weight", row_weight, rows, student)
    mask = check_rowwise("mask", mask, rows, student)
    counted = _check_target(target, ignore_index, rows, student, axis)
    mask = counted if mask is None else mask & counted
    divisor = reduction_divisor(reduction, student, axis, mask)
    safe = target.masked_fill(~counted, 0)
    row = _more.Row(
        safe, None, (alpha, beta), axis, temperature, row_weight, mask, divisor, reduction != "none"
    )
    return _more.dkd(student, teacher, row)


@annotate("topk_kd_loss")
def topk_kd_loss(
    student: torch.Tensor,
    indices: torch.Tensor,
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    tail: Tail = "bucket",
    log_normalizer: torch.Tensor | None = None,
    reduction: Reduction = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""KL to a teacher of which only the k largest logits of each row were kept, as from a cache on disk.

    With K the k classes, q = softmax(student/T) over all V classes, and the teacher's p_c = exp(logits_c/T - Z):

    ``tail="bucket"`` compares k + 1 outcomes, all classes outside K being one of them:

    .. math:: T^2 \left[\sum_{c \in K} p_c \log\frac{p_c}{q_c} + p_o \log\frac{p_o}{q_o}\right],
              \quad p_o = 1 - \sum_K p_c,\ q_o = 1 - \sum_K q_c

    ``tail="renormalize"`` compares softmax(student/T) and softmax(teacher/T) taken over K alone; classes outside
    K get no gradient.

    Z, the teacher's log-sum-exp at T over **all** V classes, is what tells the mass of its tail; k logits alone
    do not. Keep it in the cache (``torch.logsumexp(teacher / T, -1)``) and pass it as ``log_normalizer``; for
    logits that are log-probabilities at T = 1, and ``temperature=1``, it is a tensor of zeros. Without it
    the teacher is taken to have no tail: Z is the log-sum-exp over K and p_o = 0, so that the student is
    drawn to put no mass outside K. With k = V both tails equal :func:`kd_kl_div`.

    Args:
        student: Logits ``[..., V]``, any strides; float32, bfloat16, float16 or float64.
        indices: int64 ``[..., k]``, the classes that were kept; distinct in a row. A negative one is padding.
            On the CPU an index ≥ V is refused; on a GPU, where looking would mean to wait, it is padding too.
        logits: The teacher's logits at those classes, same shape, floating point. Gets no gradient.
        temperature: T > 0; a float, or a 0-d tensor (read on the device). Gets no gradient.
        tail: ``"bucket"`` or ``"renormalize"``.
        log_normalizer: Z of each row, ``[...]``; only for ``"bucket"``. Gets no gradient.
        reduction: As in :func:`kd_kl_div`.
        row_weight: A factor a row, ``[...]``. Gets no gradient.
        mask: bool ``[...]``; a row where it is False adds nothing and gets no gradient.

    Returns:
        A 0-d tensor, or for ``"none"`` one value a row; float32, float64 for float64 student logits.

    Raises:
        TypeError: Logits that are not floating point, indices that are not int64, a mask that is not bool.
        ValueError: Shapes, devices, ``temperature``, ``tail``, ``indices`` or ``reduction`` out of what is said
            above; ``log_normalizer`` with ``"renormalize"``; cached tensors that require grad.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: got {reduction!r}; accepted: {', '.join(get_args(Reduction))}")
    if tail not in get_args(Tail):
        raise ValueError(f"tail: got {tail!r}; accepted: {', '.join(get_args(Tail))}")
    check_logits(student, student)
    check_logits(logits, logits, ("logits", "logits"))
    rows = student.shape[:-1]
    _check_indices(indices, logits, student)
    temperature = check_temperature(temperature, student)
    if log_normalizer is not None and tail == "renormalize":
        raise ValueError(
            "log_normalizer: got a tensor; tail='renormalize' compares the k classes alone and has no use for it"
        )
    log_normalizer = check_rowwise("log_normalizer", log_normalizer, rows, student)
    row_weight = check_rowwise("row_weight", row_weight, rows, student)
    mask = check_rowwise("mask", mask, rows, student)
    axis = student.dim() - 1
    divisor = reduction_divisor(reduction, student, axis, mask)
    if mask is not None:  # a row that does not count may hold anything, in the cache too
        logits = logits.masked_fill(~mask.unsqueeze(-1), 0.0)
    options = (float(tail == "bucket"),)
    row = _more.Row(
        indices, log_normalizer, options, axis, temperature, row_weight, mask, divisor, reduction != "none"
    )
    return _more.topk(student, logits, row)


@annotate("dist_loss")
def dist_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float | torch.Tensor = 1.0,
    dim: int = -1,
) -> torch.Tensor:
    r"""DIST: one minus the correlation of teacher and student, within each sample and within each class.

    .. math:: T^2 \left[\beta\,\frac{1}{B}\sum_b (1 - \rho(q_{b,:}, p_{b,:}))
              + \gamma\,\frac{1}{V}\sum_c (1 - \rho(q_{:,c}, p_{:,c}))\right]

    with q = softmax(student/T), p = softmax(teacher/T) and Pearson's ρ, whose denominator is |a||b| + 1e-8 (Huang
    et al. 2022, "Knowledge distillation from a stronger teacher", Eqs. 6 to 9; T² and ε as in its authors' code).

    The second term runs over the samples of this call: under data parallelism, those of one process.

    Args:
        student: Logits, at least 2-d, any strides; float32, bfloat16, float16 or float64. Every index but the
            class is a sample.
        teacher: Logits of the same shape on the same device; its dtype may differ.
        beta: β ≥ 0, weight of the inter-class term (within a sample).
        gamma: γ ≥ 0, weight of the intra-class term (within a class).
        temperature: T > 0; a float, or a 0-d tensor (read on the device). Gets no gradient.
        dim: The class dimension.

    Returns:
        A 0-d tensor; float32, float64 when either input is. Both logits get exact gradients. A sample or class
        whose values are all equal has no correlation: ρ = 0.

    Raises:
        TypeError: Logits that are not floating point.
        ValueError: Shapes, devices, ``dim``, ``temperature``, ``beta`` or ``gamma`` out of what is said above;
            no samples at all.
    """
    beta, gamma = _number("beta", beta), _number("gamma", gamma)
    axis, rows = _check_pair(student, teacher, dim, "sum")
    if not rows:
        raise ValueError(
            "student: got 1-d logits; DIST compares samples, so at least 2 dimensions are needed"
        )
    if student.numel() == 0:
        raise ValueError(
            f"student: got shape {tuple(student.shape)}; DIST needs at least one sample and one class"
        )
    temperature = check_temperature(temperature, student)
    row = _more.Row(None, None, (beta, gamma), student.dim() - 1, temperature, None, None, 1.0, True)
    return _more.dist(student.movedim(axis, -1), teacher.movedim(axis, -1), row)


def _check_indices(indices: torch.Tensor, logits: torch.Tensor, student: torch.Tensor) -> None:
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"indices: got {type(indices).__name__}; a tensor is needed")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: got dtype {indices.dtype}; int64 class indices are needed")
    if indices.shape[:-1] != student.shape[:-1] or indices.dim() != student.dim():
        raise ValueError(
            f"indices: got shape {tuple(indices.shape)}; {(*student.shape[:-1], 'k')} is needed, as student has it"
        )
    if logits.shape != indices.shape:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}; indices has {tuple(indices.shape)}, and they must match"
        )
    if not 1 <= indices.shape[-1] <= student.shape[-1]:
        raise ValueError(f"indices: got k = {indices.shape[-1]}; accepted: 1 to {student.shape[-1]}")
    for name, tensor in (("indices", indices), ("logits", logits)):
        if tensor.device != student.device:
            raise ValueError(
                f"{name}: is on {tensor.device}; student is on {student.device}, and they must match"
            )
    if logits.requires_grad:
        raise ValueError("logits: requires grad; a cached teacher gets no gradient, pass logits.detach()")
    if (
        indices.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and bool((indices >= student.shape[-1]).any())
    ):
        raise ValueError(
            f"indices: got class {int(indices.max())}; accepted: 0 to {student.shape[-1] - 1}, or -1 to pad"
        )


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
