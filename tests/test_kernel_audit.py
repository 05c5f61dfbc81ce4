"""Kernels compiled for GPUs that are not here: no spills, wide loads. The quick ones always, all of them when slow."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.conftest import INTERPRETING

if INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from bench.audit_table import VARIANTS, Variant, faults, occupancy, table
from bench.static_audit import CAPABILITIES, KernelReport, audit

REPORT = KernelReport(
    name="kernel",
    capability=90,
    grid=(1,),
    num_warps=4,
    registers=100,
    stack=0,
    shared=16,
    spills=0,
    instructions=500,
    loads=Counter({"LDG.E.64": 1}),
    stores=Counter({"STG.E.U16": 2}),
)


def check(variant: Variant, capability: int) -> None:
    reports = audit(variant.call, capability)
    assert reports, "nothing was launched"
    assert [fault for report in reports for fault in faults(variant, report)] == []


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.fast], ids=lambda v: v.name)
def test_a_kernel_of_each_family_compiles_well_for_hopper(variant: Variant) -> None:
    check(variant, 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_kernel_compiles_well_everywhere(variant: Variant, capability: int) -> None:
    check(variant, capability)


def test_every_family_with_kernels_is_audited() -> None:
    from pathlib import Path

    kernels = Path(__file__).parents[1] / "kernels"
    shared = {"", "launch", "philox"}
    families = {path.stem.split("_")[0] for path in kernels.glob("*.py")} - shared
    assert {variant.name.partition(":")[0] for variant in VARIANTS} == families
    assert {variant.name.partition(":")[0] for variant in VARIANTS if variant.fast} == families


def test_faults_are_found() -> None:
    wanted = Variant("losses: x", lambda: None, load=16, store=4)
    assert faults(wanted, REPORT) == [
        "losses: x, kernel, sm_90: loads are 8 bytes wide; 16 are wanted",
        "losses: x, kernel, sm_90: stores are 2 bytes wide; 4 are wanted",
    ]
    spilling = replace(REPORT, spills=3)
    assert faults(Variant("losses: x", lambda: None), spilling) == [
        "losses: x, kernel, sm_90: 3 spill instructions; 0 are accepted"
    ]
    assert faults(Variant("losses: x", lambda: None, spills=3), spilling) == []


def test_occupancy_is_what_registers_leave() -> None:
    # 100 registers are 3328 a warp, 13312 for four: four programs of 128 threads.
    assert occupancy(REPORT) == 4 * 128 / 2048
    assert occupancy(replace(REPORT, registers=32)) == 1.0
    assert occupancy(replace(REPORT, registers=16, num_warps=1)) == 0.5


def test_the_table_has_a_row_for_each_report() -> None:
    text = table([(Variant("losses: x", lambda: None, moves=6), REPORT)])
    assert "| losses: x | kernel | 90 | 4 | 100 | 16 | 0 | 8 B | 2 B | 500 | 6 | 25 % |" in text
