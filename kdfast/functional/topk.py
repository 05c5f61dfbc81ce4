"""KL to a teacher of which only the k largest logits were kept."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from kdfast.functional._checks import (
    check_logits,
    check_reduction,
    check_rowwise,
    check_temperature,
    check_tensor,
)
from kdfast.functional._reduction import Reduction, reduction_divisor
from kdfast.ops import topk as ops
from kdfast.ops.common.row_loss import Row
from kdfast.profiling import annotate

__all__ = ["Tail", "topk_kd_loss"]

Tail = Literal["bucket", "renormalize"]


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
    check_reduction(reduction)
    if not isinstance(tail, str) or tail not in get_args(Tail):
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
    reduce = reduction != "none"
    row = Row(
        options, axis, temperature, row_weight, mask, divisor, reduce, label=indices, factor=log_normalizer
    )
    return ops.topk(student, logits, row)


def _check_indices(indices: torch.Tensor, logits: torch.Tensor, student: torch.Tensor) -> None:
    check_tensor("indices", indices)
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
