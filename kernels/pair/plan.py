"""Which launch plan the JSD and DKD kernels take: one frozen dataclass, chosen by one heuristic from the shape."""

from __future__ import annotations

import triton

from ..common.plan import TilePlan
from ..common.tile import CLASS_PIXEL, ONE_ROW, few_classes
from ..machine import triton_version

#: A row pair up to this many classes stays in registers; half as many where both gradients are written, which
#: spills on sm_100.
MAX_ROW = 8192
#: The same for the class dimension of [B, C, H, W].
MAX_CLASSES = 256
#: Threads of a program that reads a row in a loop, 16 bytes each; twice as many where 64 registers are enough.
LOOP_THREADS = 256
#: With so many a multiprocessor holds two programs of 16 warps.
FEW_REGISTERS = 64


def pair_plan(
    num_classes: int,
    inner: int,
    class_stride: int,
    itemsize: int,
    *,
    both: bool = False,
    capability: int = 0,
    registers: int = 0,
    masked: bool = False,
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
        capability: The GPU's.
        registers: So many are enough on sm_80 to sm_90 for a thread that reads a row in a loop and writes the student's
            gradient, and 128 for both gradients of a row on the chip; 0: not known.
        masked: Whether a class of each row is set apart (DKD).
    """
    padded = max(2, triton.next_power_of_2(num_classes))
    if class_stride != 1 and inner > 1 and padded <= MAX_CLASSES:
        return TilePlan(
            "classes", CLASS_PIXEL, padded, max(16, min(256, 2048 // padded)), 1, 8 if padded > 128 else 4
        )
    known = registers if 80 <= capability < 100 else 0
    if padded > (MAX_ROW // 2 if both else MAX_ROW):
        # Of rows that only both gradients bring here, 256 threads would spill a register of DKD's on sm_90.
        threads = LOOP_THREADS if padded > MAX_ROW else LOOP_THREADS // 2
        if both:
            known = 0
        if known == FEW_REGISTERS:
            # The rows of two programs a multiprocessor stay in an H100's cache from one read to the next: 34 MB of 50,
            # at 32000 classes in bfloat16. Three to five programs of 8 warps, which fit unasked, have 51 to 84.
            threads *= 2
        return TilePlan("loop", ONE_ROW, threads, 1, 16 // itemsize, max(1, threads // 32), registers=known)
    if padded > 1024:
        warps = max(4, padded // 512)
        # Two programs of 8 warps: while one alone computes, nothing is loaded.
        return TilePlan("rows", ONE_ROW, padded, 1, 1, warps, registers=128 if known and warps == 8 else 0)
    # Both gradients of 32 classes a thread would take 250 registers; by Triton 3.6 so does one, of a masked row that is
    # read class by class.
    crowded = both or (masked and num_classes % 2 and triton_version() < (3, 7))
    return few_classes(num_classes, itemsize, 64 if crowded else 32)
