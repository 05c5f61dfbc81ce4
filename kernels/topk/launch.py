"""Launch of the kernel for cached top-k teachers; the equation is in the package."""

from __future__ import annotations

from typing import Any

import torch

from ..common.launch_rows import RowLaunches, RowPlan, Rows
from . import bodies
from .plan import MOST_COMPARED, topk_plan


def topk_arguments(
    student: torch.Tensor,
    index: torch.Tensor,
    logits: torch.Tensor,
    normalizer: torch.Tensor | None,
    bucket: bool,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(what varies of a launch beside its rows, what its plan depends on).

    Args:
        student: Logits ``[..., V]``.
        index: int64 ``[..., k]``, contiguous; negative: padding.
        logits: Of the teacher at those classes, contiguous.
        normalizer: The teacher's log-sum-exp at T of each row, contiguous, or None.
        bucket: Whether the other classes are one more outcome.
    """
    k = index.shape[-1]
    if k > MOST_COMPARED and student.numel():  # the kernel does not see to it that each class counts once
        index = _once(index, logits)
    return (index, logits, normalizer), (k, bucket, normalizer is not None)


def _planned(at: Rows, k: int, bucket: bool, normalizer: bool) -> RowPlan:
    plan = topk_plan(at.num_classes, k)
    threads = 32 * plan.num_warps
    vector = min(plan.block // threads, 16 // at.tensors[0].itemsize)
    constants = {"K": k, "WIDE": plan.wide, "BUCKET": bucket, "NORMALIZER": normalizer}
    constants |= {"THREADS": threads, "VECTOR": vector, "ALONG": int(at.wide)}
    constants |= {"BLOCKS": plan.block // (threads * vector)}
    constants |= {"ONCE": plan.once, "num_warps": plan.num_warps}
    return RowPlan(bodies.topk_kernel, (at.num_rows,), constants)


TOPK = RowLaunches(_planned, ("index_ptr", "logit_ptr", "normalizer_ptr"), reads=1)


def _once(index: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Padding where a class has been named before in its row, for lists too long to compare on the chip."""
    name = index.masked_fill(logits == float("-inf"), -1)
    order = name.argsort(dim=-1, stable=True)
    in_order = name.gather(-1, order)
    again = torch.zeros_like(name, dtype=torch.bool)
    again[..., 1:] = in_order[..., 1:] == in_order[..., :-1]
    return name.masked_fill(torch.zeros_like(again).scatter(-1, order, again), -1)
