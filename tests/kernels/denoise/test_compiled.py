"""The step kernels compiled ahead of time for real GPUs, without one: no spills, wide loads and stores."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import INTERPRETING

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Binary:
    """What can be read off a compiled kernel."""

    constants: dict[str, Any]
    opcodes: Counter[str]
    stack: int
    registers: int

    @property
    def per_element(self) -> float:
        """Instructions an element, of straight-line code."""
        threads = 32 * self.constants["num_warps"]
        useful = sum(count for opcode, count in self.opcodes.items() if opcode != "NOP")
        return useful * threads / float(self.constants["BLOCK"])

    def accesses(self, kind: str, width: str) -> int:
        return sum(
            n for opcode, n in self.opcodes.items() if opcode.startswith(kind) and opcode.endswith(width)
        )


@pytest.fixture(params=[80, 90, 100], ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Binary]]:
    from bench.static_audit import launching_with
    from kdfast.kernels.denoise import launch as denoise

    captured: list[tuple[Any, dict[str, Any]]] = []

    def capture(kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        captured.append((kernel.warmup(*args, grid=grid, **kwargs), kwargs))

    def compile_(call: Callable[[Any], Any]) -> Binary:
        captured.clear()
        call(denoise)
        (binary, constants) = captured[0]
        assert binary.metadata.target.arch == request.param
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        sass = subprocess.run([TOOLS / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        opcodes = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", sass, re.MULTILINE
        )
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found
        return Binary(constants, Counter(opcodes), int(found[2]), int(found[1]))

    with launching_with(capture, request.param):
        yield compile_


def tensors(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(8, 4, 32, 32, dtype=dtype), torch.zeros(16, 8, 32, 32, dtype=dtype), torch.zeros(9, 10)


def step(dtype: torch.dtype = torch.bfloat16, rows: int = 16, **options: Any) -> Callable[[Any], Any]:
    def call(kernels: Any) -> Any:
        sample, output, table = tensors(dtype)
        if options.pop("channels_last", False):
            sample, output = (t.contiguous(memory_format=torch.channels_last) for t in (sample, output))
        return kernels.denoise_step(sample, output[:rows], table, torch.tensor(1), dtype=dtype, **options)

    return call


def backward(kernels: Any) -> Any:
    sample, output, table = tensors()
    mask = torch.zeros(sample.numel() // 8, dtype=torch.uint8)
    return kernels.denoise_step_backward(
        sample, None, table, 1, grad_sample=torch.empty_like(sample), grad_output=output[:8], mask=mask,
        order=(0, 1, 2, 3),
    )  # fmt: skip


GUIDED = (2.0, True, None)
Z = torch.zeros(8, 4, 32, 32)
#: Variant: call, most registers, most instructions an element, tensor reads and writes of 16 bytes a thread.
VARIANTS = {
    "plain": (step(rows=8), 64, 24, 2, 1),
    "dit": (step(guidance=GUIDED, clip=1.0, want_x0=True), 64, 34, 3, 2),
    "first_channels": (step(guidance=(2.0, True, 3)), 64, 34, 3, 1),
    "clip_mask": (step(rows=8, clip=1.0, want_mask=True), 64, 34, 2, 1),
    "multistep_fp32": (step(torch.float32, rows=8, history=[Z, Z], noise=Z, want_x0=True), 96, 44, 10, 4),
    "philox": (step(rows=8, seed=1), 96, 75, 2, 1),
    "learned_range": (step(guidance=GUIDED, learned_variance=True, seed=1), 96, 90, 4, 1),
    "backward": (backward, 64, 30, 1, 2),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_spills_and_wide_accesses(compiled: Callable[..., Binary], variant: str) -> None:
    call, registers, instructions, loads, stores = VARIANTS[variant]
    binary = compiled(call)
    assert binary.stack == 0
    assert not any(opcode.startswith(("STL", "LDL")) for opcode in binary.opcodes)
    assert binary.registers <= registers
    assert binary.per_element <= instructions
    assert binary.accesses("LDG", ".128") == loads
    assert binary.accesses("STG", ".128") == stores


def test_channels_last_moves_a_pixel_at_once(compiled: Callable[..., Binary]) -> None:
    """Four of eight channels, neighbours in memory: nothing is wider than a pixel, and nothing narrower."""
    binary = compiled(step(guidance=GUIDED, channels_last=True))
    assert binary.stack == 0
    assert binary.accesses("LDG", ".64") >= 6
    assert binary.accesses("STG", ".64") == 2
    assert binary.accesses("LDG", ".U16") == binary.accesses("STG", ".U16") == 0
