"""Divergences and cross-entropy of linear heads, for vocabularies whose logits do not fit in memory."""

from __future__ import annotations

import math
from typing import get_args

import torch

from kdfast.functional._checks import (
    check_between,
    check_factor,
    check_labels,
    check_rowwise,
    check_temperature,
    check_tensor,
    elsewhere,
    refuse_distributed,
)
from kdfast.functional._reduction import Reduction, reduction_divisor
from kdfast.functional.divergence import Kind, check_kind, check_ratio
from kdfast.functional.kl import label_factor
from kdfast.functional.topk import Tail, check_topk
from kdfast.ops import linear as ops
from kdfast.profiling import annotate
from kdfast.reference.common import compute_dtype

__all__ = ["fused_linear_kd_loss"]

Tensor = torch.Tensor
Head = tuple[Tensor, Tensor, Tensor | None]


@annotate("fused_linear_kd_loss")
def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    kind: Kind = "forward_kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    beta: float = 0.5,
    alpha: float = 0.5,
    target: Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_topk: tuple[Tensor, ...] | None = None,
    tail: Tail = "bucket",
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_rows: int | None = None,
    reduction: Reduction = "batchmean",
    row_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A divergence between a linear head's logits and a teacher, and their cross-entropy, without the logits.

    ``kd_weight · divergence_loss(s, t, kind=kind, ...) + ce_weight · F.cross_entropy(s, target, ...)`` with
    ``s = F.linear(student_hidden, student_weight, student_bias)``, as :func:`divergence_loss` and
    :func:`distillation_loss` define them. Rows are taken ``chunk_rows`` at a time: their logits come out of the matrix
    product in float32, one launch writes loss and gradient (with labels too for ``"forward_kl"``; one more for the
    cross-entropy beside another kind), and two products turn that into gradients of hidden states and weight. Gradients
    are computed in the forward; the backward scales them where they lie. Rows that ``mask`` leaves out are never
    multiplied: that takes one look at the mask, for which the host waits (a CUDA graph that is captured computes all).

    **Peak memory**, beside inputs and returned gradients, for n = ``chunk_rows`` and b = 4 bytes (8 in float64):
    c·n·V·b for c tensors of logits that are alive at a time, plus 2·n·H·b for products, plus, for a half-precision
    weight, 4·V·H that its gradient is summed in and 2·n·V for the gradient's rounding (a CPU widens both weights
    besides, 4·V·(H + H_t)). c is 2 for ``"forward_kl"``, 3 for another kind, with ``softcap``, and where 8 does not
    divide V; one less for ``teacher_logits``; 2 for ``teacher_topk`` and for ``kd_weight=0``; one more for labels
    beside another kind with ``teacher_logits``, or beside ``teacher_topk``. That is what the kernels need, whatever the
    number of rows; the reference on a CPU has some more tensors of a chunk's size.

    Args:
        student_hidden: ``[..., H]``, float32, bfloat16, float16 or float64.
        student_weight: ``[V, H]``, as in ``torch.nn.Linear``, of the same dtype (under autocast any).
        teacher_hidden: ``[..., H_t]`` with the same leading sizes; its width and dtype are its own.
        teacher_weight: ``[V, H_t]``. None with ``teacher_hidden``: the head is tied, the teacher takes the student's
            weight and bias. The student's own weight may be passed, too.
        kind: As in :func:`divergence_loss`.
        temperature: T > 0; a float, or a 0-d tensor (read on the device). Gets no gradient.
        teacher_temperature: T_t of the teacher; None: T.
        beta: β of ``"jsd"`` and ``"ab"``.
        alpha: α of the skew divergences, of ``"alpha"`` and of ``"ab"``.
        target: int64 classes ``[...]``; needed where ``ce_weight`` is not 0.
        kd_weight: Factor of the divergence, ≥ 0; at 0 no teacher is needed, and rows without a label do not count.
        ce_weight: Factor of the cross-entropy (at temperature 1), ≥ 0.
        ignore_index: Rows with this target have no cross-entropy; their divergence stays.
        label_smoothing: Share of the target spread evenly over the classes, 0 to 1.
        student_bias: ``[V]``, or None.
        teacher_bias: ``[V]``, or None.
        teacher_logits: ``[..., V]`` instead of a teacher's head, taken as they are.
        teacher_topk: ``(indices, logits)`` or ``(indices, logits, log_normalizer)`` of a stored teacher, as
            :func:`topk_kd_loss` takes them, ``[..., k]`` and ``[...]``; for ``"forward_kl"`` at one temperature.
        tail: Of ``teacher_topk``.
        softcap: c > 0 of c·tanh(x/c), which the student's logits go through before anything else; None: as they are.
        teacher_softcap: The same for the logits of ``teacher_hidden``.
        chunk_rows: Rows whose logits are alive at a time; None: as many as make 512 MiB of all that are.
        reduction: ``"batchmean"``, ``"mean"``, ``"sum"`` or ``"rowmean"`` of the logits, as in
            :func:`distillation_loss`.
        row_weight: A factor a row, ``[...]``. Gets no gradient.
        mask: bool ``[...]``; a row where it is False (a padding token) adds nothing and gets no gradient.

    Returns:
        A 0-d tensor; float32, float64 when a hidden state or ``teacher_logits`` is. 0 for no rows. It can be
        differentiated once. The teacher gets no gradient.

    Raises:
        TypeError: Tensors that are not floating point, or whose dtype differs from their hidden states'; sharded
            tensors (``DTensor``): gather them, ``weight.full_tensor()``, or call inside the module that FSDP gathers; a
            chunk_rows that is no int.
        ValueError: More than one teacher, or none; shapes, devices and numbers out of what is said above; teacher
            tensors that require grad.

    Example:
        >>> loss = fused_linear_kd_loss(hidden, head.weight, teacher_hidden, teacher_head.weight.detach(),
        ...                             kind="jsd", beta=0.1, target=labels, ce_weight=0.5, reduction="rowmean")
    """
    if not isinstance(reduction, str) or reduction not in get_args(Reduction) or reduction == "none":
        raise ValueError(f"reduction: got {reduction!r}; accepted: batchmean, mean, sum, rowmean")
    kind_, numbers = check_kind(kind, alpha, beta)
    kd_weight, ce_weight = check_factor("kd_weight", kd_weight), check_factor("ce_weight", ce_weight)
    smoothing = check_between("label_smoothing", label_smoothing, 0.0, 1.0)
    student = _head("student", student_hidden, student_weight, student_bias, student_hidden)
    rows, num_classes = student_hidden.shape[:-1], student_weight.shape[0]
    _one_teacher(teacher_hidden, teacher_weight, teacher_logits, teacher_topk, kd_weight)
    teacher: Head | None = None
    if teacher_hidden is not None:
        if teacher_weight is None:
            teacher_weight = student_weight
            teacher_bias = student_bias if teacher_bias is None else teacher_bias
        own = student_hidden, student_weight, student_bias
        teacher = _teacher_head(teacher_hidden, teacher_weight, teacher_bias, own, rows)
    elif teacher_bias is not None or teacher_softcap is not None:
        name = "teacher_softcap" if teacher_bias is None else "teacher_bias"
        raise ValueError(
            f"{name}: got one without teacher_hidden; it is for the logits that are computed here"
        )
    index = normalizer = None
    if teacher_topk is not None:
        if kind_ != "forward_kl" or teacher_temperature is not None:
            raise ValueError(
                f"teacher_topk: got one with kind={kind!r} and teacher_temperature={teacher_temperature}; the other "
                "classes' logits are gone: it is for kind='forward_kl' at one temperature"
            )
        index, teacher_logits, normalizer = check_topk(
            teacher_topk, tail, (*rows, num_classes), student_hidden
        )
    elif teacher_logits is not None:
        _check_given("teacher_logits", teacher_logits, (*rows, num_classes), student_hidden)
    temperature = check_temperature(temperature, student_hidden)
    ratio, ratio_tensor = check_ratio(temperature, teacher_temperature, student_hidden)
    row_weight = check_rowwise("row_weight", row_weight, rows, student_hidden)
    mask = check_rowwise("mask", mask, rows, student_hidden)
    if target is None and ce_weight:
        raise ValueError("target: got None; it is needed when ce_weight is not 0")
    target = check_labels("target", target, rows, num_classes, ignore_index, student_hidden)
    logits = student_hidden.new_empty(()).expand(
        *rows, num_classes
    )  # its sizes are all that the divisor reads
    divisor = reduction_divisor(reduction, logits, logits.dim() - 1, mask)
    label = factor = None
    if target is not None and ce_weight:
        label = target.flatten()
        dtype = compute_dtype(*(x for x in (student_hidden, teacher_hidden, teacher_logits) if x is not None))
        factor = label_factor(target, ignore_index, ce_weight, reduction, mask, dtype).flatten() * divisor
    if not kd_weight:
        teacher = teacher_logits = index = normalizer = None
        counts = (
            student_hidden.new_zeros(rows, dtype=torch.bool)
            if target is None or not ce_weight
            else target != ignore_index
        )
        mask = counts if mask is None else mask & counts
    head = (None, None, None) if teacher is None else teacher
    job = ops.Job(
        hidden=student[0],
        weight=student[1],
        bias=student[2],
        teacher_hidden=head[0],
        teacher_weight=head[1],
        teacher_bias=head[2],
        teacher_logits=None if teacher_logits is None else teacher_logits.flatten(0, -2),
        teacher_index=None if index is None else index.flatten(0, -2),
        teacher_normalizer=None if normalizer is None else normalizer.flatten(),
        kind=kind_,
        numbers=numbers,
        kd_weight=kd_weight,
        smoothing=smoothing,
        softcap=_cap("softcap", softcap),
        teacher_softcap=_cap("teacher_softcap", teacher_softcap),
        bucket=tail == "bucket",
        temperature=temperature,
        ratio=ratio if ratio_tensor is None else ratio_tensor,
        row_weight=None if row_weight is None else row_weight.flatten(),
        mask=None if mask is None else mask.flatten(),
        divisor=divisor,
        label=label,
        factor=factor,
    )
    return ops.fused_linear_kd(job, _chunk_rows(chunk_rows, job))


def _one_teacher(
    hidden: Tensor | None,
    weight: Tensor | None,
    logits: Tensor | None,
    topk: tuple[Tensor, ...] | None,
    kd_weight: float,
) -> None:
    given = {"teacher_hidden": hidden, "teacher_logits": logits, "teacher_topk": topk}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{names[1]}: got one beside {names[0]}; one teacher is needed")
    if hidden is None and weight is not None:
        raise ValueError("teacher_hidden: got None; it is needed together with teacher_weight")
    if not names and kd_weight:
        raise ValueError(
            "teacher_hidden: got None; a teacher is needed (teacher_hidden, teacher_logits or teacher_topk), or "
            "kd_weight=0 for the cross-entropy alone"
        )


def _head(role: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> Head:
    """Checked, in autocast's dtype, its rows flat: hidden states ``[..., H]``, weight ``[V, H]``, bias ``[V]``."""
    parts = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for part, tensor in parts.items():
        _check_tensor(f"{role}_{part}", tensor, like)
    autocast = ops.autocasts(like.device)
    for part, tensor in parts.items():
        if not autocast and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{role}_{part}: got dtype {tensor.dtype}; {role}_hidden has {hidden.dtype}, and they must match "
                "outside autocast"
            )
    if hidden.dim() < 2:
        raise ValueError(f"{role}_hidden: got shape {tuple(hidden.shape)}; [..., H] with rows is needed")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{role}_weight: got shape {tuple(weight.shape)}; ('V', {hidden.shape[-1]}) is needed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{role}_bias: got shape {tuple(bias.shape)}; ({weight.shape[0]},) is needed")
    if autocast:
        half = torch.get_autocast_dtype(like.device.type)
        hidden, weight = hidden.to(half), weight.to(half)
        bias = None if bias is None else bias.to(half)
    return hidden.flatten(0, -2), weight, bias


def _teacher_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, student: Head, rows: torch.Size
) -> Head:
    """The teacher's, which gets no gradient; a head that it shares with the student is read as it is."""
    like, own_weight, own_bias = student
    shared = weight is own_weight, bias is own_bias
    for name, tensor, is_shared in (
        ("hidden", hidden, False),
        ("weight", weight, shared[0]),
        ("bias", bias, shared[1]),
    ):
        wants = isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled()
        if wants and not is_shared:
            raise ValueError(
                f"teacher_{name}: requires grad; kdfast gives the teacher none here, pass teacher_{name}.detach() or "
                "freeze it"
            )
    if isinstance(weight, Tensor):
        weight = weight.detach()
    if isinstance(bias, Tensor):
        bias = bias.detach()
    head = _head("teacher", hidden, weight, bias, like)
    if hidden.shape[:-1] != rows:
        raise ValueError(
            f"teacher_hidden: got shape {tuple(hidden.shape)}; {(*rows, 'H_t')} is needed, the leading sizes of "
            "student_hidden"
        )
    if weight.shape[0] != own_weight.shape[0]:
        raise ValueError(
            f"teacher_weight: got {weight.shape[0]} classes; student_weight has {own_weight.shape[0]}, and they must "
            "match"
        )
    return head


def _check_tensor(name: str, tensor: Tensor, like: Tensor) -> None:
    if isinstance(tensor, Tensor):
        refuse_distributed(name, tensor)
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: got dtype {tensor.dtype}; a floating-point tensor is needed")
    if tensor.device != like.device:
        raise elsewhere(name, tensor, "student_hidden", like.device)


def _check_given(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    _check_tensor(name, tensor, like)
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; {tuple(shape)} is needed")
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name}: requires grad; kdfast gives the teacher none here, pass {name}.detach()")


def _cap(name: str, value: float | None) -> float:
    if value is None:
        return 0.0
    cap = check_between(name, value, 0.0, math.inf)
    if cap == 0.0:
        raise ValueError(f"{name}: got 0; above 0 is needed, or None for logits as they are")
    return cap


def _chunk_rows(chunk_rows: int | None, job: ops.Job) -> int:
    if chunk_rows is None:
        forward_kl = job.kind == "forward_kl" and job.alike and job.teacher_index is None
        alive = ops.chunks_alive(
            job.weight.shape[0],
            None if job.kd_weight == 0 else "forward_kl" if forward_kl else "another",
            labels=job.label is not None,
            head=job.teacher_hidden is not None,
            softcap=job.softcap != 0,
        )
        rows: int = ops.default_chunk_rows(job.weight.shape[0], itemsize=job.dtype.itemsize, chunks=alive)
        return rows
    if not isinstance(chunk_rows, int) or isinstance(chunk_rows, bool):
        raise TypeError(f"chunk_rows: got {type(chunk_rows).__name__}; an int is needed")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: got {chunk_rows}; at least 1 is needed")
    return chunk_rows
