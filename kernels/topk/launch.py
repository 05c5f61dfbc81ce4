"""Launch of the kernel for cached top-k teachers; the equation is in the package."""

from __future__ import annotations

import torch

from ..common.launch_rows import RowLaunches, RowPlan, Rows, Wanted
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
    want = Wanted(want_rows or not reduce, reduce, exit_if_one)
    options = (index.shape[-1], bucket, normalizer is not None)
    further = (index, logits, normalizer)
    return TOPK((student,), (grad_student,), student.dim() - 1, scale, want, upstream, further, options)


def _planned(at: Rows, k: int, bucket: bool, normalizer: bool) -> RowPlan:
    plan = topk_plan(at.num_classes, k)
    constants = {"K": k, "WIDE": plan.wide, "BLOCK": plan.block, "BUCKET": bucket, "NORMALIZER": normalizer}
    return RowPlan(bodies.topk_kernel, (at.num_rows,), constants | {"num_warps": plan.num_warps})


TOPK = RowLaunches(_planned, ("index_ptr", "logit_ptr", "normalizer_ptr"))
