"""KL to a teacher of which only the k largest logits were kept."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from kdfast.functional._checks import (
    check_logits,
    check_rowwise,
    check_tensor,
    elsewhere,
    on_host,
    savable,
)
from kdfast.functional._reduction import Reduction, reduction_divisor
from kdfast.functional._rows import check_rows, listed
from kdfast.ops import topk as ops
from kdfast.ops.common.gradients import is_compiling
from kdfast.ops.common.row_loss import Row
from kdfast.profiling import annotate

__all__ = ["Tail", "topk_kd_loss"]

Tail = Literal["bucket", "renormalize"]
_TAILS = get_args(Tail)


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
        indices: int64 ``[..., k]``, the classes that were kept, in any order. A negative one is padding; a class that
            is named again in its row (servers add the drawn token to its k) counts once, where it is named first; a
            row that names none adds nothing. On the CPU an index ≥ V is refused; on a GPU, where looking would mean to
            wait, it is padding too.
        logits: The teacher's logits at those classes, same shape, floating point (log-probabilities in float16, say).
            -inf is padding. Gets no gradient.
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
    axis, temperature, row_weight, mask = check_rows(
        student, student, temperature, -1, reduction, row_weight, mask
    )
    if (  # else all that is asked below is known
        is_compiling()
        or not listed((student, indices, logits), ())
        or logits.requires_grad
        or indices.is_inference()
        or on_host(indices)
    ):
        check_logits(logits, logits, ("logits", "logits"))
        _check_indices(indices, logits, student.shape, student)
        indices = savable(indices)
    _check_tail(tail, log_normalizer)
    if log_normalizer is not None:
        log_normalizer = check_rowwise("log_normalizer", log_normalizer, student.shape[:-1], student)
    divisor = reduction_divisor(reduction, student, axis, mask)
    if mask is not None:  # a row that does not count may hold anything, in the cache too
        logits = logits.masked_fill(~mask.unsqueeze(-1), 0.0)
    options = (float(tail == "bucket"),)
    reduce = reduction != "none"
    row = Row(
        options, axis, temperature, row_weight, mask, divisor, reduce, label=indices, factor=log_normalizer
    )
    return ops.topk.run(student, logits, row)


def check_topk(
    given: tuple[torch.Tensor, ...], tail: str, shape: tuple[int, ...], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``teacher_topk`` of the fused heads: (indices, logits, log_normalizer or None), for logits of ``shape``."""
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        size = f" of {len(given)}" if isinstance(given, tuple | list) else ""
        raise TypeError(
            f"teacher_topk: got {type(given).__name__}{size}; a tuple (indices, logits) or (indices, logits, "
            "log_normalizer) is needed"
        )
    _check_tail(tail, given[2] if len(given) == 3 else None)
    check_logits(given[1], given[1], ("teacher_topk[1]", "teacher_topk[1]"))
    _check_indices(given[0], given[1], shape, like, ("teacher_topk[0]", "teacher_topk[1]"))
    normalizer = given[2] if len(given) == 3 else None
    return given[0], given[1], check_rowwise("teacher_topk[2]", normalizer, torch.Size(shape[:-1]), like)


def _check_tail(tail: str, log_normalizer: torch.Tensor | None) -> None:
    if not isinstance(tail, str) or tail not in _TAILS:
        raise ValueError(f"tail: got {tail!r}; accepted: {', '.join(_TAILS)}")
    if log_normalizer is not None and tail == "renormalize":
        raise ValueError(
            "log_normalizer: got a tensor; tail='renormalize' compares the k classes alone and has no use for it"
        )


def _check_indices(
    indices: torch.Tensor,
    logits: torch.Tensor,
    shape: tuple[int, ...],
    student: torch.Tensor,
    names: tuple[str, str] = ("indices", "logits"),
) -> None:
    first, second = names
    check_tensor(first, indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"{first}: got dtype {indices.dtype}; int64 class indices are needed")
    own = indices.shape
    if own[:-1] != shape[:-1] or len(own) != len(shape):
        raise ValueError(
            f"{first}: got shape {tuple(own)}; {(*shape[:-1], 'k')} is needed, as student has it"
        )
    if logits.shape != own:
        raise ValueError(
            f"{second}: got shape {tuple(logits.shape)}; {first} has {tuple(own)}, and they must match"
        )
    if own[-1] < 1:
        raise ValueError(f"{first}: got k = 0; at least 1 is needed")
    for name, tensor in ((first, indices), (second, logits)):
        if tensor.device != student.device:
            raise elsewhere(name, tensor, "student", student.device)
    if logits.requires_grad:
        raise ValueError(
            f"{second}: requires grad; a cached teacher gets no gradient, pass {second}.detach()"
        )
    if on_host(indices) and bool((indices >= shape[-1]).any()):
        raise ValueError(
            f"{first}: got class {int(indices.max())}; accepted: 0 to {shape[-1] - 1}, or -1 to pad"
        )
