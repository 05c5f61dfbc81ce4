"""Compiled for GPUs that are not here: no spills, wide loads and stores, and the plan that each shape gets."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from tests.conftest import INTERPRETING

pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from bench.static_audit import CAPABILITIES, KernelReport, audit, meta
from kdfast.kernels import pair
from kdfast.kernels.dist import launch as dist
from kdfast.kernels.dist.plan import dist_plan
from kdfast.kernels.kl import Scale, Wanted
from kdfast.kernels.machine import use_machine
from kdfast.kernels.pair.plan import FEW_REGISTERS, pair_plan
from kdfast.kernels.topk import launch as topk
from kdfast.kernels.topk.plan import TopKPlan, topk_plan

SCALE, TOTAL = Scale(2.0, 1.0, None, None), Wanted(False, True)
BF16, FP32 = torch.bfloat16, torch.float32


def integers(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.int64, device="meta")


def run_pair(kind: int, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> Callable[[], object]:
    """Forward with both gradients: what holds the most registers."""
    s, t = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype)
    target = integers(*shape[:dim], *shape[dim + 1 :]) if kind == pair.DKD else None
    own = pair.pair_arguments(kind, target, 1.0, 0.5)
    return lambda: pair.PAIR(
        (s, t), (torch.empty_like(s), torch.empty_like(t)), dim, SCALE, TOTAL, None, *own
    )


def run_student(kind: int, shape: tuple[int, ...], dtype: torch.dtype = BF16) -> Callable[[], object]:
    """Forward with the student's gradient: what people train with."""
    s, t = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype)
    target = integers(shape[0]) if kind == pair.DKD else None
    own = pair.pair_arguments(kind, target, 1.0, 0.5)
    return lambda: pair.PAIR((s, t), (torch.empty_like(s), None), 1, SCALE, TOTAL, None, *own)


@pytest.mark.parametrize(("kind", "budget"), [(pair.JSD, 41), (pair.DKD, 47)], ids=["jsd", "dkd"])
def test_a_row_on_the_chip_costs_no_more_than_its_budget(kind: int, budget: int) -> None:
    """Lane instructions an element without the branch for rows that nearly agree: a variant that is never launched."""
    (report,) = audit(run_student(kind, (65536, 1000)), 90, RARE=False)
    assert report.instructions_per_element(4000) <= budget, report  # a program has four rows
    assert report.registers <= 128, report
    (whole,) = audit(run_student(kind, (65536, 1000)), 90)
    assert whole.spills == 0, whole


@pytest.mark.parametrize("num_classes", [1001, 1002])
@pytest.mark.parametrize("kind", [pair.JSD, pair.DKD], ids=["jsd", "dkd"])
def test_rows_that_begin_anywhere_do_not_spill(kind: int, num_classes: int) -> None:
    (report,) = audit(run_student(kind, (65536, num_classes)), 90)
    assert report.spills == 0, report


def test_dkd_by_triton_3_6_has_two_warps_for_a_row_that_is_read_class_by_class() -> None:
    """With one it would take 255 registers and spill 90 there."""
    lanes = {}
    for version in ("3.6", "3.8"):
        with use_machine(f"90:132:{version}"):
            lanes[version] = [128 // pair_plan(v, 1, 1, 2, masked=True).rows for v in (1000, 1001, 1002)]
    assert lanes == {"3.6": [32, 64, 32], "3.8": [32, 32, 32]}


@pytest.mark.parametrize(("kind", "registers"), [(pair.JSD, 64), (pair.DKD, 104)], ids=["jsd", "dkd"])
def test_a_row_that_is_read_three_times_costs_no_more_than_its_budget(kind: int, registers: int) -> None:
    (report,) = audit(run_student(kind, (4096, 32000)), 90, RARE=False)
    # A thread takes 8 classes at a time.
    assert sum(report.loops[:3]) / 8 <= {pair.JSD: 62, pair.DKD: 63}[kind], report
    (whole,) = audit(run_student(kind, (4096, 32000)), 90)
    assert whole.spills == 0, whole
    assert whole.registers <= registers, whole
    assert programs(whole) == 2, whole


def test_a_jsd_of_another_mixture_costs_a_select_more() -> None:
    s, t = meta(4096, 32000, dtype=BF16), meta(4096, 32000, dtype=BF16)
    own = pair.pair_arguments(pair.JSD, None, 1.0, 0.3)
    call = functools.partial(pair.PAIR, (s, t), (torch.empty_like(s), None), 1, SCALE, TOTAL, None, *own)
    (report,) = audit(call, 90, RARE=False)
    assert sum(report.loops[:3]) / 8 <= 66, report
    (whole,) = audit(call, 90)
    assert whole.spills == 0, whole
    assert programs(whole) == 2, whole


def programs(report: KernelReport) -> int:
    """That a multiprocessor of sm_80 to sm_90 holds, for all that registers say."""
    return 65536 // (report.num_warps * 32 * report.registers)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", [pair.JSD, pair.DKD])
def test_two_programs_with_both_gradients_do_not_spill(
    kind: int, dtype: torch.dtype, capability: int
) -> None:
    (report,) = audit(run_pair(kind, (4096, 4096), 1, dtype), capability)
    assert report.spills == 0, report
    assert programs(report) == 2, report


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", range(pair.JSD, pair.AB + 1))
def test_long_rows_in_flight_stay_in_the_cache(kind: int, dtype: torch.dtype, capability: int) -> None:
    """Two programs a multiprocessor, of 16 warps where 64 registers are enough; what waits out a loop may be spilt."""
    (report,) = audit(run_student(kind, (4096, 32000), dtype), capability)
    assert report.spills_in_loops == 0, report
    assert report.spills <= 8, report
    if report.num_warps == 16:
        assert programs(report) == 2, report
    else:
        assert kind == pair.DKD or (kind in (pair.ALPHA, pair.AB) and dtype == BF16)


def run_topk(num_classes: int, dtype: torch.dtype, bucket: bool) -> Callable[[], object]:
    s = meta(64, num_classes, dtype=dtype)
    normalizer = meta(64) if bucket else None
    own = topk.topk_arguments(s, integers(64, 50), meta(64, 50), normalizer, bucket)
    return lambda: topk.TOPK((s,), (torch.empty_like(s),), 1, SCALE, Wanted(True, True), None, *own)


def run_dist(num_classes: int, dtype: torch.dtype) -> Callable[[], object]:
    s, t = meta(256, num_classes, dtype=dtype), meta(256, num_classes, dtype=dtype)
    return lambda: dist.run(s, t, 1.0, 1.0, SCALE, (torch.empty_like(s), torch.empty_like(t)))


def dist_report(kernel: str, num_rows: int, num_classes: int, dtype: torch.dtype) -> KernelReport:
    """One of the kernels of a forward with the student's gradient."""
    s, t = meta(num_rows, num_classes, dtype=dtype), meta(num_rows, num_classes, dtype=dtype)
    reports = audit(lambda: dist.run(s, t, 1.0, 1.0, SCALE, (torch.empty_like(s), None)), 90)
    (report,) = [report for report in reports if report.name == kernel]
    return report


@pytest.mark.parametrize(
    ("num_classes", "dtype", "budget"), [(1000, BF16, 32), (1000, FP32, 30), (8192, BF16, 42)]
)
def test_a_row_of_dist_on_the_chip_costs_no_more_than_its_budget(
    num_classes: int, dtype: torch.dtype, budget: int
) -> None:
    """Lane instructions an element of the row kernel, which reads each logit once."""
    report = dist_report("dist_tile_rows_kernel", 4096, num_classes, dtype)
    assert report.spills == 0, report
    tile = dist_plan(4096, num_classes, dtype.itemsize).tile
    assert tile is not None
    assert report.instructions_per_element(tile.rows * num_classes) <= budget, report


@pytest.mark.parametrize(("num_classes", "dtype", "budget"), [(1000, BF16, 22), (1000, FP32, 22)])
def test_a_column_of_dist_costs_no_more_than_its_budget(
    num_classes: int, dtype: torch.dtype, budget: int
) -> None:
    """Lane instructions an element of the turn that reads all rows but the first."""
    report = dist_report("dist_columns_kernel", 65536, num_classes, dtype)
    assert report.spills == 0, report
    plan = dist_plan(65536, num_classes, dtype.itemsize)
    assert report.loops[0] * 32 * plan.num_warps / (plan.tile_rows * plan.columns) <= budget, report
    assert report.registers <= 128, report


def variants() -> list[pytest.ParameterSet]:
    """(call, bytes of the widest load and store at least). Most are slow: compiling one takes seconds."""
    shapes = {  # classes last, or dimension 1; 16 bytes wherever a row's length allows it
        "V1000": ((65536, 1000), 1),
        "V100": ((65536, 100), 1),
        "V4096": ((4096, 4096), 1),
        "V8192": ((4096, 8192), 1),
        "V32000": ((64, 32000), 1),
        "C19": ((8, 19, 64, 1024), 1),
        "C150": ((2, 150, 64, 64), 1),
    }
    quick = {"jsd-V1000-bf16", "dkd-V1000-bf16", "topk-V32000-bf16-bucket", "dist-V1000-bf16"}
    cases: dict[str, tuple[Callable[[], object], int]] = {}
    for dtype, label in ((BF16, "bf16"), (FP32, "fp32")):
        for name, (shape, dim) in shapes.items():
            width = 8 if (name, label) == ("V100", "bf16") else 16  # a row of 200 bytes begins on 8
            cases[f"jsd-{name}-{label}"] = run_pair(pair.JSD, shape, dim, dtype), width
            cases[f"dkd-{name}-{label}"] = run_pair(pair.DKD, shape, dim, dtype), width
        for num_classes in (1000, 32_000, 128_256):
            cases[f"topk-V{num_classes}-{label}-bucket"] = run_topk(num_classes, dtype, True), 16
        cases[f"topk-V32000-{label}-renormalize"] = run_topk(32_000, dtype, False), 8  # int64 indices
        for num_classes in (1000, 32_000):
            cases[f"dist-V{num_classes}-{label}"] = run_dist(num_classes, dtype), 16
    return [
        pytest.param(*case, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, case in cases.items()
    ]


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=() if c == 90 else pytest.mark.slow) for c in CAPABILITIES]
)
@pytest.mark.parametrize("call, width", variants())
def test_no_spills_and_wide_accesses(call: Callable[[], object], width: int, capability: int) -> None:
    reports = audit(call, capability)
    assert reports
    for report in reports:
        assert report.spills == 0, report
        assert report.registers <= 255
        if report.name not in (
            "dist_rows_kernel",
            "dist_tile_rows_kernel",
            "dist_columns_kernel",
            "dist_merge_kernel",
        ):
            assert report.widest_store >= width, report
        if report.name != "dist_merge_kernel":
            assert report.widest_load >= width, report


@pytest.mark.parametrize(
    "num_classes, inner, stride, itemsize, regime",
    [
        (10, 1, 1, 4, "rows"),
        (1000, 1, 1, 2, "rows"),
        (8192, 1, 1, 2, "rows"),
        (8193, 1, 1, 2, "loop"),
        (128_256, 1, 1, 2, "loop"),
        (19, 4096, 4096, 4, "classes"),
        (150, 4096, 4096, 2, "classes"),
        (1000, 4096, 4096, 4, "rows"),
    ],
)
def test_each_regime_gets_its_plan(
    num_classes: int, inner: int, stride: int, itemsize: int, regime: str
) -> None:
    plan = pair_plan(num_classes, inner, stride, itemsize)
    assert plan.regime == regime
    assert plan.regime == "loop" or plan.chunks * plan.width >= num_classes


def test_two_gradients_leave_room_for_half_as_long_a_row() -> None:
    assert pair_plan(4096, 1, 1, 2, both=True).regime == "rows"
    assert pair_plan(4097, 1, 1, 2, both=True).regime == "loop"


def test_long_rows_get_more_warps_where_few_registers_are_enough() -> None:
    plan = pair_plan(32_000, 1, 1, 2, capability=90, registers=FEW_REGISTERS)
    assert (plan.num_warps, plan.registers, plan.chunks) == (16, FEW_REGISTERS, 512)
    plan = pair_plan(32_000, 1, 1, 2, capability=90, registers=104)
    assert (plan.num_warps, plan.registers, plan.chunks) == (8, 104, 256)
    for further in ({"capability": 100}, {"capability": 0}, {"capability": 90, "both": True}):
        plan = pair_plan(32_000, 1, 1, 2, registers=FEW_REGISTERS, **further)
        assert (plan.num_warps, plan.registers) == (8, 0)


def test_two_programs_hold_both_gradients_of_a_row_on_the_chip() -> None:
    both = {"both": True, "registers": FEW_REGISTERS}
    assert pair_plan(4096, 1, 1, 2, capability=90, **both).registers == 128
    assert pair_plan(4096, 1, 1, 2, capability=100, **both).registers == 0
    assert pair_plan(2048, 1, 1, 2, capability=90, **both).registers == 0


def test_every_row_of_dist_is_in_exactly_one_split() -> None:
    for num_rows in (1, 31, 4096, 65_537):
        for num_classes in (10, 1000, 32_000):
            plan = dist_plan(num_rows, num_classes, 2)
            assert (plan.splits - 1) * plan.rows_per_split < num_rows <= plan.splits * plan.rows_per_split


def test_long_rows_of_topk_take_several_blocks() -> None:
    assert topk_plan(1000, 50) == TopKPlan(1024, 64, 2, once=True)
    assert topk_plan(16_384, 50) == TopKPlan(4096, 64, 8, once=True)
    assert topk_plan(128_256, 50) == TopKPlan(8192, 64, 16, once=True)
    assert not topk_plan(128_256, 200).once  # too many pairs for the chip


@pytest.mark.parametrize("kind", [pair.TRIANGULAR, pair.AB])
@pytest.mark.parametrize("shape", [(65536, 1000), pytest.param((64, 32000), marks=pytest.mark.slow)])
def test_the_other_divergences_do_not_spill(kind: int, shape: tuple[int, ...]) -> None:
    for call in (run_student(kind, shape), run_pair(kind, shape, 1, BF16)):
        (report,) = audit(call, 90)
        assert report.spills == 0, report
        assert report.widest_load == report.widest_store == 16, report
