"""Launch of the JSD and DKD kernels; the equations are in the package."""

from __future__ import annotations

import torch

from ..common.launch_rows import RowLaunches, RowPlan, Rows, Wanted
from ..common.scale import Scale
from ..common.tile import tile_grid, tile_sizes
from . import bodies
from .plan import pair_plan

JSD, DKD = 0, 1


def pair_loss(
    kind: int,
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor | None,
    alpha: float,
    beta: float,
    dim: int,
    scale: Scale,
    *,
    reduce: bool,
    want_rows: bool = True,
    grad_student: torch.Tensor | None = None,
    grad_teacher: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
) -> torch.Tensor:
    """Launch the JSD or DKD kernel once.

    Args:
        kind: ``JSD`` or ``DKD``.
        student: Logits, any strides; bfloat16, float16 or float32.
        teacher: Logits of the same shape, its own strides and dtype.
        target: The rows' target classes, contiguous, for DKD.
        alpha: DKD's α.
        beta: β of either loss.
        dim: Class dimension, non-negative.
        scale: The row factors; the rest as of :func:`kdfast.kernels.kl.kd_kl`.

    Returns:
        The 0-d loss when ``reduce``, else one float32 value a row.
    """
    want = Wanted(want_rows or not reduce, reduce, exit_if_one)
    gradients = (grad_student, grad_teacher)
    further = (target, float(alpha), float(beta))
    return PAIR((student, teacher), gradients, dim, scale, want, upstream, further, (kind,))


def _planned(at: Rows, kind: int) -> RowPlan:
    student, teacher, *_ = at.tensors
    plan = pair_plan(
        at.num_classes,
        at.layout.inner,
        min(strides[2] for strides in at.layout.strides[:2]),
        max(student.itemsize, teacher.itemsize),
        both=None not in at.given,
    )
    loop = plan.regime == "loop"
    own = {"BLOCK": plan.chunks} if loop else tile_sizes(plan, at.layout)
    kernel = bodies.pair_loop_kernel if loop else bodies.pair_tile_kernel
    return RowPlan(kernel, tile_grid(plan, at.layout), own | {"KIND": kind, "num_warps": plan.num_warps})


PAIR = RowLaunches(_planned, ("target_ptr", "alpha", "beta"))
