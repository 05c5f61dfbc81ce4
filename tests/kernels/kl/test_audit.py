"""What the compiler makes of the KL kernels, for GPUs that are not here: no spills, wide loads, few instructions.

Budgets are lane instructions an element of straight-line code, without the branch for nearly equal rows and the loop
in which the last program sums all losses; they stand beside the byte formula in kernels/kl/. An H200 issues about 45
(bfloat16) or 90 (float32) in the time in which it moves 3N.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kdfast.kernels import kl
from kdfast.kernels.machine import machine_of, use_machine
from tests.support.compiled import CAPABILITIES, KernelReport, audit, meta

F32, BF16 = torch.float32, torch.bfloat16


def compiled(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    dim: int,
    capability: int,
    *,
    both: bool = False,
    riding: str = "",
    **overrides: Any,
) -> list[KernelReport]:
    """What the forward launch of these logits compiles to."""
    student, teacher = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype)
    dim %= len(shape)
    rows = shape[:dim] + shape[dim + 1 :]
    label, factor = meta(*rows, dtype=torch.int64), meta(*rows)
    family, own = {
        "": (kl.PLAIN, ()),
        "labels": (kl.LABELS, ((label, factor, label, factor, 0.1, 0.0), (2, None, False))),
        "statistics": (kl.STATISTICS, ((label, factor, meta(*rows, dtype=torch.bool)),)),
    }[riding]
    loss = riding != "statistics"  # they ask for rows alone, without gradients
    wanted = kl.Wanted(not loss, loss)

    def call() -> None:
        gradients = (
            torch.empty_like(student) if loss else None,
            torch.empty_like(teacher) if both else None,
        )
        family((student, teacher), gradients, dim, kl.Scale(2.0, 4.0, None, None), wanted, None, *own)

    return audit(call, capability, **overrides)


# shape, dtype, class dimension, both gradients, instructions an element, bytes of the widest load and store
CASES = [
    ((1 << 20, 10), F32, -1, False, 48, 8),
    ((1 << 20, 100), F32, -1, False, 34, 16),
    ((65536, 1000), BF16, -1, False, 31, 16),
    ((65536, 1000), BF16, -1, True, 36, 16),
    ((65536, 1271), BF16, -1, False, 32, 16),
    ((4096, 8192), BF16, -1, False, 35, 16),
    ((8, 13, 512, 1024), F32, 1, False, 27, 16),
    ((8, 19, 512, 1024), F32, 1, False, 27, 16),
    ((8, 19, 512, 1024), BF16, 1, False, 32, 4),
    ((8, 21, 512, 1024), F32, 1, False, 28, 8),
    ((8, 150, 512, 1024), F32, 1, False, 72, 16),
]
#: These compile in seconds, and always run; the matrix is `slow`.
ALWAYS = [CASES[2], CASES[4], CASES[7], CASES[8]]


def label(case: Any) -> str:
    return f"{'x'.join(map(str, case[0]))}-{str(case[1])[6:]}{'-both' if case[3] else ''}"


def check(case: Any, capability: int) -> KernelReport:
    """Without the branch for nearly equal rows: a variant to count, which is never launched."""
    shape, dtype, dim, both, budget, width = case
    (report,) = compiled(shape, dtype, dim, capability, both=both, NEAR=False)
    elements = torch.Size(shape).numel() / report.grid[0]
    assert min(report.widest_load, report.widest_store) >= width
    assert report.instructions_per_element(elements) <= budget, report
    return report


@pytest.mark.parametrize("case", ALWAYS, ids=label)
def test_common_path_on_hopper(case: Any) -> None:
    assert check(case, 90).spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_common_path(case: Any, capability: int) -> None:
    check(case, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("riding", ["", "labels", "statistics"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_nothing_spills_with_every_branch(case: Any, riding: str, capability: int) -> None:
    shape, dtype, dim, both, _, _ = case
    for report in compiled(shape, dtype, dim, capability, both=both, riding=riding):
        assert report.spills == 0, report


def test_a_cluster_holds_a_long_row() -> None:
    """3N for 128k classes: 8 programs a row, nothing spilt, nothing read twice."""
    if machine_of(torch.device("cpu")).triton < (3, 8):
        pytest.skip("clusters compile from Triton 3.8 on")
    (report,) = compiled((4096, 128256), BF16, -1, 90)
    assert report.name == "kd_kl_tile_kernel"
    assert report.spills == 0
    assert (report.widest_load, report.widest_store) == (16, 16)


def test_few_long_rows_take_two_launches() -> None:
    reports = compiled((8, 128256), BF16, -1, 80)
    assert [report.name for report in reports] == ["kd_kl_split_sums_kernel", "kd_kl_split_kernel"]
    for report in reports:
        assert report.spills == 0
        assert report.widest_load == 16
        assert report.grid[0] >= 8 * 16


@pytest.mark.parametrize("riding", ["labels", "statistics"])
@pytest.mark.parametrize("shape", [(65536, 100), (4096, 32000)], ids=["tile", "two_pass"])
def test_what_rides_along_does_not_spill(shape: tuple[int, int], riding: str) -> None:
    (report,) = compiled(shape, F32, -1, 90, riding=riding)
    assert report.spills == 0
    assert report.widest_load == 16


def test_the_budgets_are_the_ones_that_the_kernels_state() -> None:
    stated = dict(re.findall(r"^    (\S+ \S+) +(\d+)$", kl.__doc__ or "", re.M))
    assert len(stated) == len(CASES)
    for case in CASES:
        shape, dtype, _, both, budget, _ = case
        key = f"{'x'.join(map(str, shape[-3:] if len(shape) > 2 else shape[1:]))}{'+t' if both else ''}"
        name = {F32: "float32", BF16: "bfloat16"}[dtype]
        assert int(stated[f"{key} {name}"]) == budget


@pytest.mark.parametrize(
    ("dtype", "budget"),
    [(BF16, 32), (F32, 34)],
    ids=["bfloat16", "float32"],
)
def test_a_row_that_is_read_twice_costs_no_more_than_its_budget(dtype: torch.dtype, budget: int) -> None:
    """Two reads, by vectors of a thread; what there is for rows that nearly agree is left out to count.

    The second is a loop of its own, or the compiler has unrolled its blocks, and they share what is in no loop.
    """
    shape, machine = (8192, 32000), use_machine("90:132:3.6")  # with clusters from Triton 3.8 on
    with machine:
        (counted,) = compiled(shape, dtype, -1, 90, RARE=False)
        (whole,) = compiled(shape, dtype, -1, 90)
    vector = 16 // dtype.itemsize
    blocks = -(-32000 // (counted.num_warps * 32 * vector))
    unrolled = counted.stores["STG.E.128"] == blocks
    straight = counted.instructions - sum(counted.loops) - counted.last_sum
    second = straight / blocks if unrolled else counted.loops[1]
    assert (counted.loops[0] + second) / vector <= budget, counted
    # 16 warps of 64 registers: two programs a multiprocessor.
    assert whole.spills == 0, whole
    assert whole.num_warps * 32 * whole.registers * 2 <= 65536, whole


@pytest.mark.parametrize("riding", ["", "labels", "statistics"])
def test_rows_read_twice_do_not_spill(riding: str) -> None:
    with use_machine("90:132:3.6"):
        for report in compiled((8192, 32000), BF16, -1, 90, both=riding == "", riding=riding):
            assert report.spills == 0, report
            assert report.widest_load == 16, report


@pytest.mark.slow
@pytest.mark.parametrize("riding", ["", "both", "labels", "statistics"])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("num_classes", [32000, 69000, 151936])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_loop_over_a_long_row_spills(
    capability: int, num_classes: int, dtype: torch.dtype, riding: str
) -> None:
    """Two registers or four that wait out a loop cost a row nothing: ptxas rather does that than run fewer programs."""
    both = riding == "both"
    with use_machine(f"{capability}:132:3.6"):
        (report,) = compiled(
            (4096, num_classes), dtype, -1, capability, both=both, riding="" if both else riding
        )
    assert report.spills_in_loops == 0, report
    assert report.spills <= 6, report
    assert report.loops
    if riding in ("", "both") and report.name == "kd_kl_two_pass_kernel":
        assert report.num_warps * 32 * report.registers * 2 <= 65536, report


@pytest.mark.parametrize(
    ("dtype", "both", "turns", "budget"),
    [(BF16, False, 1, 32), (F32, False, 4, 32), (BF16, True, 1, 44)],
    ids=["bfloat16", "float32", "bfloat16-both"],
)
def test_rows_by_ticket_cost_no_more_than_their_budget(
    dtype: torch.dtype, both: bool, turns: int, budget: int
) -> None:
    """Both loops of whole blocks (of the second, the compiler unrolls so many), and four programs of 8 warps a
    multiprocessor (both gradients: three).
    """
    shape = (4096, 151936)
    with use_machine("90:132:3.6"):
        (counted,) = compiled(shape, dtype, -1, 90, both=both, RARE=False)
        (whole,) = compiled(shape, dtype, -1, 90, both=both)
    assert whole.name == "kd_kl_tickets_kernel"
    vector = 16 // dtype.itemsize
    # The first read's whole and ragged blocks, the wait, the second read's.
    first, _, wait, second, *_ = counted.loops
    assert wait < 20
    assert (first + second / turns) / vector <= budget, counted
    assert whole.spills == 0, whole
    assert whole.num_warps * 32 * whole.registers * (3 if both else 4) <= 65536, whole
    assert (whole.widest_load, whole.widest_store) == (16, 16)
    # One launch of few programs: a backward that has nothing to do ends soon.
    assert whole.grid[0] <= 132 * 8


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rows_by_ticket_do_not_spill(capability: int, dtype: torch.dtype, both: bool) -> None:
    with use_machine(f"{capability}:132:3.6"):
        (report,) = compiled((4096, 262144), dtype, -1, capability, both=both)
    assert report.name == "kd_kl_tickets_kernel"
    assert report.spills == 0, report
    assert report.widest_load == 16
