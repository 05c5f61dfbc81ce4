"""Launch of the JSD and DKD kernels; the equations are in the package."""

from __future__ import annotations

from typing import Any

import torch

from ..common.launch_rows import RowLaunches, RowPlan, Rows, loop_sizes
from ..common.scale import value_and_pointer
from ..common.tile import tile_grid, tile_sizes
from ..machine import machine_of
from .loop import pair_loop_kernel
from .plan import FEW_REGISTERS, pair_plan
from .tile import pair_tile_kernel

JSD, DKD = 0, 1
#: What else the bodies know, as divergences.py counts them.
FORWARD_KL, REVERSE_KL, JEFFREYS, SKEW_FORWARD_KL, SKEW_REVERSE_KL, TOTAL_VARIATION, ALPHA, TRIANGULAR, AB = (
    range(2, 11)
)


def pair_arguments(
    kind: int,
    target: torch.Tensor | None,
    alpha: float,
    beta: float,
    ratio: torch.Tensor | float = 1.0,
    ignore: int | None = None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(what varies of a launch beside its rows, what its plan depends on).

    Args:
        kind: ``JSD``, ``DKD``, or a divergence.
        target: The rows' target classes, contiguous, for DKD.
        alpha: α of DKD and of the AB-divergence.
        beta: β of JSD, DKD and the AB-divergence; of another its number, if it has one.
        ratio: The student's temperature over the teacher's, a float or a 0-d tensor on the device; 1 for one
            temperature, and always for DKD.
        ignore: Rows of this target do not count.
    """
    even = kind == JSD and beta == 0.5
    if type(ratio) is float:
        return (target, float(alpha), float(beta), ratio, None), (kind, ratio != 1.0, False, ignore, even)
    value, pointer = value_and_pointer(ratio)
    further = (target, float(alpha), float(beta), value, pointer)
    return further, (kind, pointer is not None or value != 1.0, pointer is not None, ignore, even)


def _loop_registers(kind: int, itemsize: int) -> int:
    """That are enough for a long row: most kinds need few; eight powers at once, of 16-bit logits, take more."""
    if kind == DKD:
        return 104
    return 0 if kind in (ALPHA, AB) and itemsize == 2 else FEW_REGISTERS


def _planned(
    at: Rows, kind: int, ratio: bool, ratio_ptr: bool, ignore: int | None, even: bool = False
) -> RowPlan:
    student, teacher, *_ = at.tensors
    itemsize = max(student.itemsize, teacher.itemsize)
    plan = pair_plan(
        at.num_classes,
        at.layout.inner,
        min(strides[2] for strides in at.layout.strides[:2]),
        itemsize,
        both=None not in at.given,
        capability=machine_of(student.device).capability,
        registers=_loop_registers(kind, itemsize),
        masked=kind == DKD,
    )
    loop = plan.regime == "loop"
    told = {
        "KIND": kind,
        "RATIO": ratio,
        "RATIO_PTR": ratio_ptr,
        "IGNORE": ignore,
        "EVEN": even,
        "num_warps": plan.num_warps,
    }
    if plan.registers:
        told["maxnreg"] = plan.registers
    own = loop_sizes(plan, at) if loop else tile_sizes(plan, at.layout)
    kernel = pair_loop_kernel if loop else pair_tile_kernel
    return RowPlan(kernel, tile_grid(plan, at.layout), own | told)


PAIR = RowLaunches(_planned, ("target_ptr", "alpha", "beta", "ratio", "ratio_ptr"))
