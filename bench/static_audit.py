"""Compile kernels for GPUs that are not here, and read what the compiler made of them.

The launchers of kdfast run as they are, on ``meta`` tensors, with one substitution: where they would launch,
the kernel is compiled ahead of time, with the very arguments and specialisation of that launch. What can be
read off the machine code is exact: registers, stack, shared memory, spills (STL/LDL), widths of global loads
and stores, instruction counts. What cannot: trip counts, traffic, cache hits, achieved occupancy, races.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kdfast.kernels import launch as launching

#: The GPUs audited: A100, H100/H200, B200 by compute capability; MI300X by architecture.
CAPABILITIES = (80, 90, 100)
TARGETS: tuple[int | str, ...] = (*CAPABILITIES, "gfx942")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Driver:
    """Stands in for the CUDA driver: names the target, and is never asked to launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"  # keys the cache of compiled kernels

    def get_current_stream(self, device: object) -> int:
        return 0


@dataclass
class KernelReport:
    """What one compiled kernel looks like.

    ``elements`` are those of the first tensor it was launched with; ``loops`` the instructions of its innermost loops,
    in the order of the code, and ``spills_in_loops`` the spills among them (NVIDIA's only). The loop in which the last
    program sums all programs' losses is none of them but ``last_sum``: no other program goes there.
    """

    name: str
    capability: int | str
    grid: tuple[int, ...]
    num_warps: int
    registers: int
    stack: int
    shared: int
    spills: int
    instructions: int
    loads: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)
    elements: int = 0
    loops: list[int] = field(default_factory=list)
    spills_in_loops: int = 0
    last_sum: int = 0

    @property
    def target(self) -> str:
        """As compilers call it."""
        return f"sm_{self.capability}" if isinstance(self.capability, int) else self.capability

    @property
    def lanes(self) -> int:
        """Of a warp: 64 on AMD's GPUs."""
        return 32 if isinstance(self.capability, int) else 64

    @property
    def widest_load(self) -> int:
        """Bytes of the widest global load."""
        return max((_width(op) for op in self.loads), default=0)

    @property
    def widest_store(self) -> int:
        """Bytes of the widest global store."""
        return max((_width(op) for op in self.stores), default=0)

    def instructions_per_element(self, elements_per_program: float) -> float:
        """Lane instructions for each useful element, of straight-line code without what the last program alone runs."""
        return (self.instructions - self.last_sum) * self.lanes * self.num_warps / elements_per_program


def _width(op: str) -> int:
    if op.startswith(AMD_MEMORY):
        words = re.search(r"dword(?:x(\d))?$", op)
        return 4 * int(words[1] or 1) if words else 2 if "short" in op else 1
    if ".128" in op:
        return 16
    if ".64" in op:
        return 8
    if ".U8" in op or ".S8" in op:
        return 1
    return 2 if ".U16" in op or ".S16" in op else 4


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / name), *args], check=True, capture_output=True, text=True).stdout


#: How instructions begin that reach memory off the chip, on AMD's GPUs.
AMD_MEMORY = ("global_", "buffer_", "flat_")


def amd_report_of(compiled: Any, name: str, architecture: str, grid: tuple[int, ...]) -> KernelReport:
    """Read a compiled kernel's assembly, which says of AMD's GPUs what a disassembler would.

    ``spills`` are vector registers that went to memory; scalar ones go to lanes of vector registers.
    """
    text = compiled.asm["amdgcn"]

    def figure(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        if found is None:
            raise ValueError(f"{name}: the assembly says nothing of {key}")
        return int(found[1])

    ops = re.findall(r"^\s+((?:v|s|ds|scratch|global|buffer|flat)_\w+)", text, re.M)
    memory = [op for op in ops if op.startswith(AMD_MEMORY)]
    return KernelReport(
        name=name,
        capability=architecture,
        grid=grid,
        num_warps=compiled.metadata.num_warps,
        registers=figure("vgpr_count"),
        stack=figure("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        spills=figure("vgpr_spill_count"),
        instructions=sum(op not in ("s_nop", "s_code_end") for op in ops),
        loads=Counter(op for op in memory if "_load_" in op),
        stores=Counter(op for op in memory if "_store_" in op),
    )


def report_of(compiled: Any, name: str, capability: int, grid: tuple[int, ...]) -> KernelReport:
    """Read a compiled kernel's machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernel.cubin")
        Path(cubin).write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        sass = _tool("cuobjdump", "-sass", cubin)
    ops = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    figure = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loops = _loops(sass)
    last = [loop for loop in loops if any(op.startswith(LAST_SUM) for op in loop)]
    loops = [loop for loop in loops if loop not in last]
    return KernelReport(
        name=name,
        capability=capability,
        grid=grid,
        num_warps=compiled.metadata.num_warps,
        registers=figure["REG"],
        stack=figure["STACK"],
        shared=compiled.metadata.shared,
        spills=_spills(ops),
        instructions=sum(op != "NOP" for op in ops),  # padding behind the last branch is never issued
        loads=Counter(op for op in ops if op.startswith("LDG")),
        stores=Counter(op for op in ops if op.startswith("STG")),
        loops=[sum(op != "NOP" for op in loop) for loop in loops],
        spills_in_loops=sum(map(_spills, loops)),
        last_sum=sum(op != "NOP" for loop in last for op in loop),
    )


#: What only the sum over programs reads by (kernels/common/reduce.py).
LAST_SUM = "LDG.E.STRONG.SYS"


def _spills(ops: list[str]) -> int:
    return sum(op.startswith(("STL", "LDL")) for op in ops)


def _loops(sass: str) -> list[list[str]]:
    """What stands between a branch back and where it leads, of the loops that hold no other."""
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", sass, re.M)
    spans = []
    for address, op, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if op.startswith("BRA") and target is not None and int(target[1], 16) < int(address, 16):
            spans.append((int(target[1], 16), int(address, 16)))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[op for at, op, _ in code if low <= int(at, 16) <= high] for low, high in inner]


@contextlib.contextmanager
def compiling_for(capability: int | str, **overrides: Any) -> Iterator[list[KernelReport]]:
    """Within the block, launches compile for one of :data:`TARGETS` and append their reports to the list.

    ``overrides`` replace keyword arguments of the launch: a constexpr that leaves a rare branch out, to count
    the instructions of the common one.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("ahead-of-time compilation needs TRITON_INTERPRET unset before kdfast is imported")
    reports: list[KernelReport] = []

    def compile_instead(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        compiled = kernel.warmup(*args, grid=grid, **{**kwargs, **overrides})
        if isinstance(capability, int):
            report = report_of(compiled, kernel.__name__, capability, grid)
        else:
            report = amd_report_of(compiled, kernel.__name__, capability, grid)
        operand = next((value for value in args if isinstance(value, torch.Tensor)), None)
        report.elements = 0 if operand is None else operand.numel()
        reports.append(report)

    with launching_with(compile_instead, capability):
        yield reports


@contextlib.contextmanager
def launching_with(instead: Callable[..., None], capability: int | str) -> Iterator[None]:
    """Within the block, ``instead`` is called where kernels would be launched, for one of :data:`TARGETS`."""
    original = launching.launch
    # Families import `launch` by name: replace it wherever it went.
    kernels = [module for name, module in sys.modules.items() if name.startswith("kdfast.kernels")]
    holders: list[Any] = [module for module in kernels if getattr(module, "launch", None) is original]
    active = driver._active
    target = ("cuda", capability, 32) if isinstance(capability, int) else ("hip", capability, 64)
    driver.set_active(_Driver(GPUTarget(*target)))
    for module in holders:
        module.launch = instead
    try:
        yield
    finally:
        for module in holders:
            module.launch = original
        driver._active = active


def audit(call: Callable[[], object], capability: int | str, **overrides: Any) -> list[KernelReport]:
    """Compile what ``call`` (a launcher on meta tensors) would launch."""
    with compiling_for(capability, **overrides) as reports:
        call()
    return reports


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor with shape, strides and dtype, and no memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")
