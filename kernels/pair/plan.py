"""Which launch plan the JSD and DKD kernels take: one frozen dataclass, chosen by one heuristic from the shape."""

from __future__ import annotations

import triton

from ..common.plan import TilePlan
from ..common.tile import CHUNK_ROW_LANE, CLASS_PIXEL, ONE_ROW, ROW_CHUNK_LANE
from ..machine import triton_version

#: A row pair up to this many classes stays in registers; half as many where both gradients are written, which
#: spills on sm_100.
MAX_ROW = 8192
#: The same for the class dimension of [B, C, H, W].
MAX_CLASSES = 256
#: Threads of a program that reads a row in a loop, 16 bytes each.
LOOP_THREADS = 256


class PairPlan(TilePlan):
    """Regimes: ``"rows"`` (rows in registers), ``"classes"`` (class dimension not last) or ``"loop"``, in whose blocks
    ``chunks`` threads take ``width`` classes each.
    """


def pair_plan(
    num_classes: int, inner: int, class_stride: int, itemsize: int, *, both: bool = False
) -> PairPlan:
    """Choose the launch plan of the JSD and DKD kernels.

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
        return PairPlan(
            "classes", CLASS_PIXEL, padded, max(16, min(256, 2048 // padded)), 1, 8 if padded > 128 else 4
        )
    if padded > (MAX_ROW // 2 if both else MAX_ROW):
        # Of rows that only both gradients bring here, 256 threads would spill a register of DKD's on sm_90.
        threads = LOOP_THREADS if padded > MAX_ROW else LOOP_THREADS // 2
        return PairPlan("loop", ONE_ROW, threads, 1, 16 // itemsize, max(1, threads // 32))
    if padded > 1024:
        return PairPlan("rows", ONE_ROW, padded, 1, 1, max(4, padded // 512))
    vector = 16 // itemsize
    while vector > 2 and num_classes % vector:  # a pair at least: single lanes compile badly
        vector //= 2
    if padded > 512:
        lanes = (
            64 if both else 32
        )  # two warps a row: both gradients of 32 classes a thread would take 250 registers
    else:
        lanes = min(32, max(1, padded // 16))
    width = min(padded, lanes * vector)
    order = ROW_CHUNK_LANE if triton_version() < (3, 7) else CHUNK_ROW_LANE
    return PairPlan("rows", order, padded // width, 128 // lanes, width, 4)
