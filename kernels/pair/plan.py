"""Which launch plan the JSD and DKD kernels take: one frozen dataclass, chosen by one heuristic from the shape."""

from __future__ import annotations

import triton

from ..common.plan import TilePlan
from ..common.tile import CLASS_PIXEL, ONE_ROW, few_classes

#: A row pair up to this many classes stays in registers; half as many where both gradients are written, which
#: spills on sm_100.
MAX_ROW = 8192
#: The same for the class dimension of [B, C, H, W].
MAX_CLASSES = 256
#: Threads of a program that reads a row in a loop, 16 bytes each.
LOOP_THREADS = 256


def pair_plan(
    num_classes: int, inner: int, class_stride: int, itemsize: int, *, both: bool = False
) -> TilePlan:
    """Choose the launch plan of the JSD and DKD kernels.

    Regimes: ``"rows"`` (rows in registers), ``"classes"`` (class dimension not last) or ``"loop"``, in whose blocks
    ``chunks`` threads take ``width`` classes each.

    As the KL kernel's, with half the elements a thread: a class's two derivatives live beside its two
    probabilities. Chosen by registers and spills of compiled variants, not by timings.

    Args:
        num_classes: V.
        inner: Rows that are neighbours in memory; 1 when the class dimension is the last.
        class_stride: Elements between neighbouring classes.
        itemsize: Bytes of the widest logit element.
        both: Whether both gradients are written.
    """
    padded = max(2, triton.next_power_of_2(num_classes))
    if class_stride != 1 and inner > 1 and padded <= MAX_CLASSES:
        return TilePlan(
            "classes", CLASS_PIXEL, padded, max(16, min(256, 2048 // padded)), 1, 8 if padded > 128 else 4
        )
    if padded > (MAX_ROW // 2 if both else MAX_ROW):
        # Of rows that only both gradients bring here, 256 threads would spill a register of DKD's on sm_90.
        threads = LOOP_THREADS if padded > MAX_ROW else LOOP_THREADS // 2
        return TilePlan("loop", ONE_ROW, threads, 1, 16 // itemsize, max(1, threads // 32))
    if padded > 1024:
        return TilePlan("rows", ONE_ROW, padded, 1, 1, max(4, padded // 512))
    # Both gradients of 32 classes a thread would take 250 registers.
    return few_classes(num_classes, itemsize, 64 if both else 32)
