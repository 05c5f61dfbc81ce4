"""Which launch plan the KL kernels take: one frozen dataclass, chosen by one heuristic from shape and machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton

from ..common.plan import TilePlan
from ..common.tile import CHUNK_ROW_LANE, CLASS_PIXEL, ONE_ROW, ROW_CHUNK_LANE
from ..machine import Machine

#: A row pair up to this many classes stays in one program's registers.
MAX_ROW = 16384
#: The same for a cluster of programs, and what one of them holds.
MAX_CLUSTER_ROW = 131072
CLUSTER_PART = 16384
#: Classes that a program which reads long rows in a loop takes at once: of a row, and of a part of one.
LONG_BLOCK = 4096
SPLIT_BLOCK = 4096
#: Bytes of a part of a row pair that a program takes by ticket, and its threads.
TICKET_BYTES = 65536
TICKET_THREADS = 256
#: Bytes of the second-level cache, from a compute capability on (B200, H100, A100).
CACHES = ((100, 126 << 20), (90, 50 << 20), (80, 40 << 20))
#: The same for the class dimension of [B, C, H, W], as a tile and as tuples.
MAX_CLASSES = 512
MAX_TUPLE = 40


@dataclass(frozen=True)
class KLPlan(TilePlan):
    """Regimes: ``"rows"`` (rows in registers), ``"cluster"`` (a row in the registers of several programs),
    ``"two_pass"`` (a row read twice by one program), ``"split"`` (the same by several programs a row, in two launches),
    ``"tickets"`` (the same in one launch, the second read soon after the first), ``"chunks"`` (rows that begin
    anywhere, in registers), ``"classes"`` and ``"class_tuple"`` (class dimension not last).

    Attributes:
        num_ctas: Programs a cluster.
        window: Elements of 16 bytes, when rows begin anywhere and are read from the 16 bytes before; else 0.
        splits: Parts a row (split, tickets). There and for ``"two_pass"``, ``chunks`` threads take ``width`` classes
            each.
        lag: Rows between the first and the second read of a row (tickets).
    """

    num_ctas: int = 1
    window: int = 0
    splits: int = 1
    lag: int = 0

    @property
    def block(self) -> int:
        """Classes that a program takes at once in a loop (two_pass, split, tickets)."""
        return self.chunks * self.width


@lru_cache(maxsize=1024)
def kl_plan(
    num_classes: int,
    inner: int,
    class_stride: int,
    itemsize: int,
    *,
    num_rows: int,
    machine: Machine,
    unaligned: bool = False,
    both: bool = False,
    plain: bool = True,
    in_place: bool = False,
) -> KLPlan:
    """Choose the launch plan of the KL kernels.

    A row's classes are spread over as few lanes as leave each thread about 32 elements of each tensor: fewer
    lanes mean fewer shuffles, more elements mean spills. Tile orders and sizes come from compiled prototypes
    (instructions an element and registers), not from timings.

    Args:
        num_classes: V.
        inner: Rows that are neighbours in memory; 1 when the class dimension is the last.
        class_stride: Elements between neighbouring classes.
        itemsize: Bytes of the widest logit element.
        num_rows: Rows of all programs together.
        machine: Where it will run.
        unaligned: Rows lie class by class, alike in every tensor, and begin where 16 bytes do not.
        both: The teacher's gradient is wanted, too.
        plain: Nothing but KL is computed; only the tile and the two-pass kernel know anything else.
        in_place: A gradient goes over its logits: no program may read what another has written.
    """
    if class_stride != 1 and inner > 1 and num_classes <= MAX_CLASSES:
        return _across_plan(num_classes, itemsize, both, plain)
    window = 16 // itemsize if unaligned and plain and not in_place and num_classes >= MIN_WINDOW else 0
    padded = max(2, triton.next_power_of_2(num_classes))
    if padded > (MAX_ROW if plain else MAX_ROW // 2):
        long = _long_plan(padded, itemsize, num_rows, machine, both, plain, in_place)
        if long.regime == "two_pass" and plain and _outgrows(num_classes * itemsize, machine):
            return _ticket_plan(num_classes, itemsize, machine, both)
        return long
    if window:
        return _chunked_plan(num_classes, itemsize, window)
    if padded > 1024:
        return KLPlan("rows", ONE_ROW, padded, 1, 1, min(16, max(2, padded // (1024 if plain else 512))))
    vector = 16 // itemsize
    while vector > 2 and num_classes % vector:  # a pair at least: single lanes compile badly
        vector //= 2
    lanes = min(32, max(1, padded // 32))
    width = min(padded, lanes * vector)
    order = ROW_CHUNK_LANE if machine.triton < (3, 7) else CHUNK_ROW_LANE
    return KLPlan("rows", order, padded // width, 128 // lanes, width, 4)


def _chunked_plan(num_classes: int, itemsize: int, window: int) -> KLPlan:
    """Rows that begin anywhere: at most 5 chunks of 16-byte groups in bfloat16, 10 in float32, a lane."""
    vector = 16 // itemsize
    length = num_classes + max(0, window - 1)
    warps = 1
    while length > 32 * vector * warps * (40 // vector) and warps < 16:
        warps *= 2
    width = 32 * vector * warps
    rows = max(1, 4 // warps)
    return KLPlan("chunks", ONE_ROW, triton.cdiv(length, width), rows, width, max(4, warps), window=window)


#: Below this many classes the two boundary groups of a window cost more than its wide loads save.
MIN_WINDOW = 512


def _across_plan(num_classes: int, itemsize: int, both: bool, plain: bool) -> KLPlan:
    """[B, C, H, W]: vectors of pixels a thread, as many as its registers hold of every class."""
    if plain and num_classes <= MAX_TUPLE:
        pixels = 4 if itemsize == 4 and num_classes <= 19 else 2
        if both:  # the logits' gaps live on, too
            pixels = 2 if num_classes <= 21 else 1
        return KLPlan("class_tuple", CLASS_PIXEL, num_classes, 128 * pixels, 1, 4)
    padded = max(2, triton.next_power_of_2(num_classes))
    # bf16 loads hold 8 pixels a thread: half as many threads as float32 for the same wide loads.
    pixels = max(32, min(256, (8192 if itemsize == 2 and plain else 4096) // padded))
    warps = 8 if itemsize > 2 and padded * pixels >= 8192 else 4
    return KLPlan("classes", CLASS_PIXEL, padded, pixels, 1, warps)


def _long_plan(
    padded: int,
    itemsize: int,
    num_rows: int,
    machine: Machine,
    both: bool,
    plain: bool,
    in_place: bool,
) -> KLPlan:
    """Rows that outgrow one program's registers: programs a row, or one that reads it twice."""
    vector = 16 // itemsize
    # A split row's programs may each read all of it once more, whatever the others have stored by then.
    if plain and not in_place and num_rows < machine.multiprocessors:
        # Too few rows to fill the machine: two programs a multiprocessor, of two blocks at least.
        splits = min(
            32,
            max(1, padded // (2 * SPLIT_BLOCK)),
            triton.next_power_of_2(2 * machine.multiprocessors // num_rows),
        )
        threads = max(1, SPLIT_BLOCK // 16)
        warps = max(1, threads // 32)
        return KLPlan("split", ONE_ROW, threads, 1, vector, warps, splits=splits)
    # 8 programs is the largest portable cluster; the teacher's gradient needs half as many elements in each.
    limit = MAX_CLUSTER_ROW // 2 if both else MAX_CLUSTER_ROW
    clusters = machine.capability >= 90 and machine.triton >= (3, 8) and padded <= limit
    if plain and clusters:
        part = CLUSTER_PART // 2 if both else CLUSTER_PART
        return KLPlan("cluster", ONE_ROW, padded, 1, 1, 16, num_ctas=padded // part)
    # sm_100 would take 70, and then one program is all that a multiprocessor holds.
    registers = 64 if plain and both and machine.capability >= 80 else 0
    return looped_plan(itemsize, plain, registers)


def looped_plan(itemsize: int, plain: bool, registers: int = 0) -> KLPlan:
    """A long row by one program, which reads it twice for gradients, and once for the loss alone."""
    # 16 warps of at most 64 registers: two programs a multiprocessor, whose rows stay in the second-level cache between
    # the two reads (264 rows of 2 x 32000 bfloat16 are 34 MB of an H100's 50). Labels, by 8 warps, take 64 to 80.
    threads = LONG_BLOCK // (8 if plain else 16)
    warps = max(1, threads // 32)
    return KLPlan("two_pass", ONE_ROW, threads, 1, 16 // itemsize, warps, registers=registers)


def _outgrows(row_bytes: int, machine: Machine) -> bool:
    """Whether programs that read a row pair twice, two a multiprocessor, surely find nothing of it in the cache.

    Between the two reads of an element all of them read a row pair. Two fifths more than the cache holds are asked for:
    nearer to it no count says which plan is faster.
    """
    cache = next((size for capability, size in CACHES if machine.capability >= capability), None)
    return cache is not None and 2 * machine.multiprocessors * 2 * row_bytes > 1.4 * cache


def _ticket_plan(num_classes: int, itemsize: int, machine: Machine, both: bool) -> KLPlan:
    """Parts of eight blocks, by programs of 8 warps: four a multiprocessor in 64 registers, three in 80 for both.

    A row is read again after as many items as there are multiprocessors, a quarter of what is being worked on: its
    parts are as good as summed, and on an H100 some 30 MB have been read since.
    """
    vector = 16 // itemsize
    splits = triton.cdiv(num_classes, TICKET_BYTES // (2 * itemsize))
    lag = triton.cdiv(machine.multiprocessors, splits)
    warps = max(1, TICKET_THREADS // 32)
    registers = 80 if both else 64
    return KLPlan(
        "tickets", ONE_ROW, TICKET_THREADS, 1, vector, warps, splits=splits, lag=lag, registers=registers
    )
