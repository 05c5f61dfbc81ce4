"""Kernels compiled for GPUs that are not here: no spills, wide loads. The quick ones always, all of them when slow."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import INTERPRETING

if INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

import triton

from bench.audit_rows import Variant, faults, occupancy, per_element, table
from bench.audit_table import VARIANTS, target
from bench.static_audit import TARGETS, KernelReport, amd_report_of, audit
from tests.support.house import families

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


PAGE = Path(__file__).parents[2] / "docs" / "pages" / "kernels" / "audit.md"


def check(variant: Variant, capability: int | str) -> None:
    reports = audit(variant.call, capability)
    assert reports, "nothing was launched"
    if variant.fast:
        page = PAGE.read_text()
        rows = [f"| {variant.name} | {report.name} | {report.target} |" for report in reports]
        lacking = [row for row in rows if row not in page]
        assert lacking == [], "rewrite docs/pages/kernels/audit.md: python -m bench.audit_table --fast"
    assert [fault for report in reports for fault in faults(variant, report)] == []


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.fast], ids=lambda v: v.name)
@pytest.mark.parametrize("target", [90, "gfx942"])
def test_a_kernel_of_each_family_compiles_well(variant: Variant, target: int | str) -> None:
    check(variant, target)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_kernel_compiles_well_everywhere(variant: Variant, capability: int | str) -> None:
    check(variant, capability)


@pytest.mark.slow
def test_the_page_shows_what_the_compiler_says() -> None:
    page = PAGE.read_text()
    if f"Triton {triton.__version__};" not in page:
        pytest.skip("the page was made with another release of Triton")
    fast = [variant for variant in VARIANTS if variant.fast]
    found = [(v, report) for v in fast for name in TARGETS for report in audit(v.call, name)]
    assert page.endswith(table(found)), "python -m bench.audit_table --fast"


def test_every_family_with_kernels_is_audited() -> None:
    """`linear` has no kernel of its own."""
    known = set(families(Path(__file__).parents[2])) - {"linear"}
    for kind, found in (
        ("variant", {variant.name.partition(":")[0] for variant in VARIANTS}),
        (
            "a variant with fast=True",
            {variant.name.partition(":")[0] for variant in VARIANTS if variant.fast},
        ),
    ):
        lacking, unknown = sorted(known - found), sorted(found - known)
        assert not lacking, (
            f"{lacking}: no {kind} in VARIANTS of bench/audit_table.py, named 'FAMILY: what'; then "
            "`python -m bench.audit_table --fast` for docs/pages/kernels/audit.md "
            "(docs/pages/contributing.md#adding-an-op)"
        )
        assert not unknown, f"VARIANTS of bench/audit_table.py names {unknown}; kernels/ has no such folder"


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

    # 100 KiB and 1 of shared memory: two programs of 128 threads in 228 KiB, one in 164.
    assert occupancy(replace(REPORT, shared=100 << 10)) == 2 * 128 / 2048
    assert occupancy(replace(REPORT, shared=100 << 10, capability=80)) == 128 / 2048


def test_occupancy_on_amd() -> None:
    """gfx942: 512 registers a lane and 8 waves a SIMD, four SIMDs, 64 KiB."""
    amd = replace(REPORT, capability="gfx942")
    assert occupancy(amd) == 4 / 8  # 104 registers: four waves a SIMD
    assert occupancy(replace(amd, registers=64)) == 1.0
    assert occupancy(replace(amd, registers=64, shared=32 << 10)) == 2 * 4 / 32


def test_instructions_are_counted_for_each_element() -> None:
    """500 instructions of four warps in one program, over 6400 elements: on AMD a warp has twice the lanes."""
    variant = Variant("losses: x", lambda: None, moves=6)
    counted = replace(REPORT, elements=6400)
    assert per_element(variant, counted) == 500 * 32 * 4 / 6400
    assert per_element(variant, replace(counted, capability="gfx942")) == 500 * 64 * 4 / 6400
    assert per_element(variant, replace(counted, grid=(2, 2))) == 4 * 500 * 32 * 4 / 6400
    assert per_element(replace(variant, moves=None), counted) is None


def test_amd_assembly_is_read() -> None:
    text = """
    .vgpr_count: 40
    .vgpr_spill_count: 2
    .private_segment_fixed_size: 8
\tv_add_f32_e32 v0, v1, v2
\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
\tglobal_load_ushort v0, v[1:2], off
\tbuffer_store_dword v0, v1, s[0:3], 0 offen
\ts_nop 0
\tscratch_store_dword off, v0, s0
"""
    metadata = SimpleNamespace(num_warps=4, shared=0)
    report = amd_report_of(SimpleNamespace(asm={"amdgcn": text}, metadata=metadata), "k", "gfx942", (1,))
    assert (report.registers, report.spills, report.stack, report.instructions) == (40, 2, 8, 5)
    assert (report.widest_load, report.widest_store) == (16, 4)
    assert faults(Variant("losses: x", lambda: None, load=16, store=16), report) == [
        "losses: x, k, gfx942: 2 spill instructions; 0 are accepted"
    ]


@pytest.mark.parametrize(("text", "wanted"), [("90", 90), ("sm_100", 100), ("gfx942", "gfx942")])
def test_targets_are_named_either_way(text: str, wanted: int | str) -> None:
    assert target(text) == wanted


def test_the_table_has_a_row_for_each_report() -> None:
    text = table([(Variant("losses: x", lambda: None, moves=6), replace(REPORT, elements=6400))])
    assert "| losses: x | kernel | sm_90 | 4 | 100 | 16 | 0 | 8 B | 2 B | 500 | 10 | 6 | 25 % |" in text
