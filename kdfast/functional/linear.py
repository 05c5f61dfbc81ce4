"""KL between two linear heads, for vocabularies whose logits do not fit in memory."""

from __future__ import annotations

from typing import get_args

import torch

from kdfast.functional._checks import check_floating, check_int, check_rowwise, check_temperature
from kdfast.functional._reduction import Reduction, reduction_divisor
from kdfast.ops import linear as ops
from kdfast.profiling import annotate

__all__ = ["fused_linear_kd_loss"]


@annotate("fused_linear_kd_loss")
def fused_linear_kd_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    chunk_rows: int | None = None,
    reduction: Reduction = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`kd_kl_div` of two linear heads' logits, which never exist all at once.

    The same value as ``kd_kl_div(F.linear(student_hidden, student_weight, student_bias),
    F.linear(teacher_hidden, teacher_weight, teacher_bias), temperature)``. Rows are taken ``chunk_rows`` at a
    time: their logits come out of the matrix product in float32, the KL kernel writes the gradient over the
    student's, and two more products turn that into gradients of hidden states and weight. Beside the gradients
    themselves (a half-precision weight's is summed in float32) two chunks of logits are alive. Gradients are
    computed in the forward; the backward scales them.

    Args:
        student_hidden: ``[..., H]``, float32, bfloat16, float16 or float64.
        student_weight: ``[V, H]``, as in ``torch.nn.Linear``, of the same dtype (under autocast any).
        teacher_hidden: ``[..., H_t]`` with the same leading sizes; its width and dtype are its own. Gets no
            gradient.
        teacher_weight: ``[V, H_t]``. Gets no gradient: freeze it, or pass it detached.
        temperature: T > 0; a float, or a 0-d tensor (read on the device). Gets no gradient.
        student_bias: ``[V]``, or None.
        teacher_bias: ``[V]``, or None. Gets no gradient.
        chunk_rows: Rows whose logits are alive at a time; None: as many as make 256 MiB of float32.
        reduction: ``"batchmean"``, ``"mean"``, ``"sum"`` or ``"rowmean"`` of the logits, as in
            :func:`kd_kl_div`.
        row_weight: A factor a row, ``[...]``. Gets no gradient.
        mask: bool ``[...]``; a row where it is False (a padding token) adds nothing and gets no gradient.

    Returns:
        A 0-d tensor; float32, float64 when student_hidden or teacher_hidden is. It can be differentiated once.

    Raises:
        TypeError: Tensors that are not floating point, or whose dtype differs from their hidden states'; a
            chunk_rows that is no int.
        ValueError: Shapes, devices, ``temperature``, ``chunk_rows`` or ``reduction`` out of what is said above;
            teacher tensors that require grad.
    """
    if not isinstance(reduction, str) or reduction not in get_args(Reduction) or reduction == "none":
        raise ValueError(f"reduction: got {reduction!r}; accepted: batchmean, mean, sum, rowmean")
    device = _check_tensor("student_hidden", student_hidden, None)
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    heads = []
    for role, hidden, weight, bias in (
        ("student", student_hidden, student_weight, student_bias),
        ("teacher", teacher_hidden, teacher_weight, teacher_bias),
    ):
        _check_head(role, hidden, weight, bias, device, same_dtype=not autocast)
        if autocast:
            half = torch.get_autocast_dtype(device.type)
            hidden, weight = hidden.to(half), weight.to(half)
            bias = None if bias is None else bias.to(half)
        heads.append((hidden.flatten(0, -2), weight, bias))
    rows, num_classes = student_hidden.shape[:-1], student_weight.shape[0]
    if teacher_hidden.shape[:-1] != rows:
        raise ValueError(
            f"teacher_hidden: got shape {tuple(teacher_hidden.shape)}; {(*rows, 'H_t')} is needed, the leading sizes "
            "of student_hidden"
        )
    if teacher_weight.shape[0] != num_classes:
        raise ValueError(
            f"teacher_weight: got {teacher_weight.shape[0]} classes; student_weight has {num_classes}, and they must "
            "match"
        )
    for name, tensor in (
        ("teacher_hidden", teacher_hidden),
        ("teacher_weight", teacher_weight),
        ("teacher_bias", teacher_bias),
    ):
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: requires grad; kdfast gives the teacher none here, pass {name}.detach() or freeze it"
            )
    temperature = check_temperature(temperature, student_hidden)
    row_weight = check_rowwise("row_weight", row_weight, rows, student_hidden)
    mask = check_rowwise("mask", mask, rows, student_hidden)
    chunk = (
        ops.default_chunk_rows(num_classes)
        if chunk_rows is None
        else check_int("chunk_rows", chunk_rows, 1, 2**31 - 1)
    )
    logits = torch.empty((*rows, num_classes), device="meta")  # its sizes are all that the divisor reads
    return ops.fused_linear_kd(
        heads[0],
        heads[1],
        temperature,
        None if row_weight is None else row_weight.flatten(),
        None if mask is None else mask.flatten(),
        reduction_divisor(reduction, logits, logits.dim() - 1, mask),
        chunk,
    )


def _check_tensor(name: str, tensor: torch.Tensor, device: torch.device | None) -> torch.device:
    check_floating(name, tensor)
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}; student_hidden is on {device}, and they must match")
    return tensor.device


def _check_head(
    role: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    device: torch.device,
    *,
    same_dtype: bool,
) -> None:
    """Hidden states ``[..., H]``, weight ``[V, H]``, bias ``[V]``."""
    parts = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for part, tensor in parts.items():
        _check_tensor(f"{role}_{part}", tensor, device)
        if same_dtype and tensor.dtype != hidden.dtype:
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
