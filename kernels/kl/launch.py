"""Launch of the KL kernels: outputs, strides and arguments; the equation and the plans are in the package."""

from __future__ import annotations

from typing import Any

import triton

from ..common.launch_rows import Before, RowLaunches, RowPlan, Rows, Shared, in_place, loop_sizes
from ..common.tile import tile_grid, tile_sizes
from ..machine import machine_of
from . import chunks as _kl_chunks
from . import classes as _kl_classes
from . import rows as _kl_rows
from . import split as _kl_split
from . import tickets as _kl_tickets
from . import two_pass as _kl_two_pass
from .plan import KLPlan, kl_plan, looped_plan


def _plan(at: Rows, *, plain: bool) -> KLPlan:
    student, teacher, grad_student, grad_teacher = at.tensors
    layout, tensors = at.layout, [x for x in at.tensors if x is not None]
    itemsize = max(student.itemsize, teacher.itemsize)
    outer, _, class_stride = layout.strides[0]
    unaligned = (
        layout.inner == 1
        and class_stride == 1
        and outer * itemsize % 16 != 0
        and all(strides == layout.strides[0] for strides in layout.strides)
        and all(x.itemsize == itemsize and x.data_ptr() % 16 == 0 for x in tensors)
    )
    plan = kl_plan(
        at.num_classes,
        layout.inner,
        min(strides[2] for strides in layout.strides[:2]),
        itemsize,
        num_rows=at.num_rows,
        machine=machine_of(student.device),
        unaligned=unaligned,
        both=grad_teacher is not None,
        plain=plain,
        in_place=in_place((student, teacher), (grad_student, grad_teacher)),
    )
    if plan.regime == "tickets" and grad_student is None and grad_teacher is None:
        return looped_plan(itemsize, plain)
    return plan


def _planned(at: Rows, *, stored: dict[str, Any] | None = None) -> RowPlan:
    """The launch, with what a kernel is told that knows labels or statistics."""
    plan = _plan(at, plain=stored is None)
    (programs,) = tile_grid(plan, at.layout)
    kernel, own = _kernel(plan, at)
    warps = {"num_warps": plan.num_warps, "num_ctas": plan.num_ctas}
    before = None
    if plan.registers:
        warps["maxnreg"] = plan.registers
    if plan.regime == "tickets":
        return _by_tickets(plan, at, own | warps)
    if plan.regime == "split":
        # Five numbers a part.
        before = Before(_kl_split.kd_kl_split_sums_kernel, own | {"num_warps": plan.num_warps}, 5)
    return RowPlan(
        kernel, (programs * plan.splits,), own | (stored or {}) | warps, plan.regime == "cluster", before
    )


#: Programs a multiprocessor: as many of 8 warps as its 2048 threads are. One more would find no ticket left.
TICKET_PROGRAMS = 8


def _by_tickets(plan: KLPlan, at: Rows, constants: dict[str, Any]) -> RowPlan:
    """Items are a part's sums and an earlier row's gradients; each program takes the next until there is none."""
    items = (at.num_rows + plan.lag) * plan.splits
    assert at.tensors[0] is not None
    programs = min(items, TICKET_PROGRAMS * machine_of(at.tensors[0].device).multiprocessors)
    shared = Shared(at.num_rows * plan.splits * _kl_tickets.WIDTH, 1 + 2 * at.num_rows)
    return RowPlan(
        _kl_tickets.kd_kl_tickets_kernel, (programs,), constants, shared=shared, partials=at.num_rows
    )


def _kernel(plan: KLPlan, at: Rows) -> tuple[Any, dict[str, Any]]:
    """The kernel of a plan, and the arguments that only it has."""
    if plan.regime == "class_tuple":
        return _kl_classes.kd_kl_classes_kernel, {"PIXELS": plan.rows}
    if plan.regime == "two_pass":
        return _kl_two_pass.kd_kl_two_pass_kernel, loop_sizes(plan, at)
    if plan.regime in ("split", "tickets"):
        part = triton.cdiv(at.num_classes, plan.block * plan.splits) * plan.block
        own = loop_sizes(plan, at) | {"PART": part}
        if plan.regime == "split":
            return _kl_split.kd_kl_split_kernel, own | {"SPLITS": plan.splits}
        own |= {"PARTS": plan.splits, "PADDED": triton.next_power_of_2(plan.splits), "LAG": plan.lag}
        return _kl_tickets.kd_kl_tickets_kernel, own
    sizes = tile_sizes(plan, at.layout)
    if plan.regime == "chunks":
        own = {name: sizes[name] for name in ("CHUNKS", "ROWS", "WIDTH")}
        return _kl_chunks.kd_kl_chunks_kernel, own | {"WINDOW": plan.window}
    return _kl_rows.kd_kl_tile_kernel, sizes


#: Labels that every program counts for itself: 8 KB from the second-level cache, where two launches of torch's would
#: read them once.
MOST_COUNTED = 1024


def _counted(counted: int, num_rows: int) -> int:
    """The kernels' COUNTED: how many labels are looked at at once, where programs count them."""
    return max(32, triton.next_power_of_2(num_rows)) if counted == 2 else counted


PLAIN = RowLaunches(_planned)
#: With hard labels on the same pass (labels.py). Further, all tensors contiguous: int64 labels, one a row, and their
#: float32 factors in the loss, 0 where one is ignored; the same for the other label of a mixed sample, or None;
#: smoothing; a weight. Options: labels a row; a class that is ignored, or None; whether the others are counted: 0 no,
#: 1 by the caller, 2 by every program, if labels are no more than MOST_COUNTED. With such a class a row's factor is the
#: weight where its label is another, over the count, which a caller that counts leaves in the factors' place, 0-d.
LABELS = RowLaunches(
    lambda at, kinds, ignore, counted: _planned(
        at, stored={"LABELS": kinds, "IGNORE": ignore, "COUNTED": _counted(counted, at.num_rows)}
    ),
    ("label_ptr", "factor_ptr", "second_label_ptr", "second_factor_ptr", "smoothing", "label_weight"),
)
#: With what is written a row: the teacher's class (int64), its probability at T = 1 (float32), agreement (bool).
STATISTICS = RowLaunches(
    lambda at: _planned(at, stored={"STATS": True}), ("class_ptr", "probability_ptr", "agreement_ptr")
)
