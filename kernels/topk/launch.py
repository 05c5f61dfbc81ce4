"""Launch of the kernel for cached top-k teachers; the equation is in the package."""

from __future__ import annotations

import torch

from ..common.launch_rows import launch_rows, nothing, outputs, rows_of
from ..common.scale import Scale
from . import bodies
from .plan import topk_plan


def topk(
    student: torch.Tensor,
    index: torch.Tensor,
    logits: torch.Tensor,
    normalizer: torch.Tensor | None,
    scale: Scale,
    *,
    bucket: bool,
    reduce: bool,
    want_rows: bool = True,
    grad_student: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
) -> torch.Tensor:
    """Launch the kernel once.

    Args:
        student: Logits ``[..., V]``, any strides; bfloat16, float16 or float32.
        index: int64 ``[..., k]``, contiguous; negative: padding.
        logits: Of the teacher at those classes, contiguous.
        normalizer: The teacher's log-sum-exp at T of each row, contiguous, or None.
        scale: The row factors.
        bucket: Whether the other classes are one more outcome. The rest as of :func:`kdfast.kernels.kl.kd_kl`.

    Returns:
        The 0-d loss when ``reduce``, else one float32 value a row.
    """
    dim, k = student.dim() - 1, index.shape[-1]
    rows, loss = outputs(student, dim, reduce=reduce, want_rows=want_rows)
    if student.numel() == 0:
        return nothing(rows, loss, scale)
    at = rows_of((student,), (grad_student,), dim)
    plan = topk_plan(at.num_classes, k)
    if not plan.once and k > 1:
        index = _once(index, logits)
    launch_rows(
        bodies.topk_kernel,
        (at.num_rows,),
        at,
        rows,
        loss,
        scale,
        upstream,
        exit_if_one,
        index_ptr=index,
        logit_ptr=logits,
        normalizer_ptr=normalizer,
        K=k,
        WIDE=plan.wide,
        BLOCK=plan.block,
        BUCKET=bucket,
        ONCE=plan.once,
        NORMALIZER=normalizer is not None,
        num_warps=plan.num_warps,
    )
    return loss if reduce else rows


def _once(index: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Padding where a class has been named before in its row, for lists too long to compare on the chip."""
    name = index.masked_fill(logits == float("-inf"), -1)
    order = name.argsort(dim=-1, stable=True)
    in_order = name.gather(-1, order)
    again = torch.zeros_like(name, dtype=torch.bool)
    again[..., 1:] = in_order[..., 1:] == in_order[..., :-1]
    return name.masked_fill(torch.zeros_like(again).scatter(-1, order, again), -1)
