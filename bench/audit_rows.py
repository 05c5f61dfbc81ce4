"""A row of the audit: what must hold of a compiled variant, its occupancy, and how it is written down."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import triton

from bench.static_audit import KernelReport

#: Registers of one multiprocessor, and threads and programs that it holds, on all of NVIDIA's GPUs audited.
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32
#: Bytes of shared memory that its programs divide among them; each takes 1 KiB more than it asks for.
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
#: gfx942, a compute unit: waves and vector registers (a lane's) of each of its four SIMDs, local memory.
SIMDS, WAVES, VGPRS, LDS = 4, 8, 512, 64 << 10


@dataclass(frozen=True)
class Variant:
    """A launch to compile, and what is known of its memory traffic.

    Attributes:
        name: ``family: what``.
        call: Runs the launcher on meta tensors.
        moves: Bytes an element, by the formula of the kernel file; None where there is none for an element.
        load, store: Bytes of the widest access that must be there; 0 for no demand.
        spills: Spill instructions that are known and accepted.
        fast: Whether the variant is part of the quick test.
    """

    name: str
    call: Callable[[], object]
    moves: float | None = None
    load: int = 0
    store: int = 0
    spills: int = 0
    fast: bool = False


def occupancy(report: KernelReport) -> float:
    """Share of a multiprocessor's threads that registers and shared memory leave room for: an upper bound."""
    if isinstance(report.capability, str):
        waves = min(WAVES, VGPRS // max(8, -(-report.registers // 8) * 8)) * SIMDS
        programs = min(waves // report.num_warps, LDS // report.shared if report.shared else waves)
        return programs * report.num_warps / (WAVES * SIMDS)
    threads = 32 * report.num_warps
    # Registers are handed out to a warp in units of 256.
    per_warp = -(-report.registers * 32 // 256) * 256
    resident = min(
        PROGRAMS,
        THREADS // threads,
        REGISTERS // (per_warp * report.num_warps),
        SHARED[report.capability] // (report.shared + 1024),
    )
    return resident * threads / THREADS


def per_element(variant: Variant, report: KernelReport) -> float | None:
    """Lane instructions an element, straight-line; None where the bytes of an element have no formula either."""
    if variant.moves is None or not report.elements:
        return None
    return report.instructions_per_element(report.elements / math.prod(report.grid))


def faults(variant: Variant, report: KernelReport) -> list[str]:
    """What does not hold of a compiled variant; widths are demanded where a warp is what they were laid out for."""
    found = []
    if report.spills > variant.spills:
        found.append(f"{report.spills} spill instructions; {variant.spills} are accepted")
    if isinstance(report.capability, int):
        if report.widest_load < variant.load:
            found.append(f"loads are {report.widest_load} bytes wide; {variant.load} are wanted")
        if report.widest_store < variant.store:
            found.append(f"stores are {report.widest_store} bytes wide; {variant.store} are wanted")
    return [f"{variant.name}, {report.name}, {report.target}: {fault}" for fault in found]


HEAD = (
    *(
        "Variant",
        "Kernel",
        "Target",
        "Warps",
        "Registers",
        "Shared",
        "Spills",
        "Load",
        "Store",
        "Instructions",
    ),
    *("an element", "Bytes an element", "Occupancy ≤"),
)


def table(rows: list[tuple[Variant, KernelReport]]) -> str:
    """As markdown."""
    lines = [f"Compiled by Triton {triton.__version__}; nothing was run.", ""]
    lines += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for variant, report in rows:
        each = per_element(variant, report)
        cells = (
            *(variant.name, report.name, report.target, report.num_warps, report.registers, report.shared),
            *(report.spills, f"{report.widest_load} B", f"{report.widest_store} B", report.instructions),
            "" if each is None else f"{each:.3g}",
            "" if variant.moves is None else f"{variant.moves:g}",
            f"{100 * occupancy(report):.0f} %",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
