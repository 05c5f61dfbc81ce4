"""The replay kernels compiled ahead of time for real GPUs, without one."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.reference.replay import PriorityRule, ReplayState, SumLayout
from tests.conftest import INTERPRETING

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RULE = (0.6, 1e-6, 2.0**22)


@dataclass(frozen=True)
class Binary:
    """What can be read off a compiled kernel."""

    ptx: str
    opcodes: list[str]
    stack: int
    registers: int

    @property
    def spills(self) -> int:
        return sum(opcode.startswith(("STL", "LDL")) for opcode in self.opcodes)


Compile = Callable[[Callable[[Any], Any]], dict[str, Binary]]


@pytest.fixture(params=[80, 90, 100], ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Compile]:
    from bench.static_audit import launching_with
    from kdfast.kernels.replay import launch as replay

    captured: dict[str, Any] = {}

    def capture(kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        captured[kernel.__name__] = kernel.warmup(*args, grid=grid, **kwargs)

    def inspect(binary: Any) -> Binary:
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])

        def tool(*args: Any) -> str:
            return subprocess.run([*args, cubin], capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool(TOOLS / "cuobjdump", "-res-usage"))
        sass = tool(TOOLS / "nvdisasm")
        opcodes = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", sass, re.MULTILINE
        )
        assert usage
        return Binary(binary.asm["ptx"], opcodes, int(usage[2]), int(usage[1]))

    def compile_(call: Callable[[Any], Any]) -> dict[str, Binary]:
        captured.clear()
        call(replay)
        return {name: inspect(binary) for name, binary in captured.items()}

    with launching_with(capture, request.param):
        yield compile_


def state(capacity: int, shape: tuple[int, ...]) -> ReplayState:
    # Only shapes and dtypes matter here, so that no memory is touched beyond a page.
    return ReplayState.allocate(
        capacity, shape, torch.uint8, 10, torch.device("cpu"), seed=0, eviction="fifo", rule=PriorityRule(*RULE),
        strict=False,
    )  # fmt: skip


def sample(s: ReplayState, affine: Any = None, batch: int = 256) -> Callable[[Any], Any]:
    layout = (s.layout.offsets, s.layout.counts)
    tensors = (s.meta, s.leaves, s.sums, s.generation, s.labels, s.rows)
    return lambda kernels: kernels.sample(*tensors, layout, batch, 0.4, True, affine)


def update(s: ReplayState, largest: bool = False) -> Callable[[Any], Any]:
    layout = (s.layout.offsets, s.layout.counts)
    tensors = (s.meta, s.leaves, s.sums, s.delta, s.generation)
    index = torch.zeros(256, dtype=torch.int64)
    return lambda kernels: kernels.update(*tensors, layout, index, torch.zeros(256), index, RULE, largest)


def add(s: ReplayState) -> Callable[[Any], Any]:
    layout = (s.layout.offsets, s.layout.counts)
    tensors = (s.meta, s.leaves, s.sums, s.delta, s.generation, s.labels, s.class_counts, s.order, s.rows)
    rows = torch.zeros(4, *s.rows.shape[1:], dtype=torch.uint8)
    labels = torch.zeros(4, dtype=torch.int64)
    return lambda kernels: kernels.add(*tensors, layout, rows, labels, torch.zeros(4), RULE)


IMAGE = (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("replay_sample", lambda: sample(state(100_000, IMAGE[:1]))),
        ("replay_sample", lambda: sample(state(5000, IMAGE))),
        ("replay_sample", lambda: sample(state(5000, IMAGE), (torch.zeros(3), torch.zeros(3)))),
        ("replay_update", lambda: update(state(100_000, (1,)))),
        ("replay_update", lambda: update(state(5000, (1,)), largest=True)),
        ("replay_add", lambda: add(state(5000, IMAGE))),
    ],
    ids=["sample_deep", "sample_images", "sample_normalised", "update", "update_max", "add"],
)
def test_no_spill_and_no_fused_arithmetic(compiled: Compile, name: str, call: Any) -> None:
    binary = compiled(call())[name]
    assert binary.spills == 0
    # sm_90 and later keep the return address of the routine for 64-bit division there; nothing is stored (no spill).
    divides = any(opcode.startswith("RET.REL") for opcode in binary.opcodes)
    assert binary.stack <= (8 if divides else 0)
    # One fused multiply-add, or one constant rounded to float32, and priorities differ from the CPU's.
    assert "fma.rn.f" not in binary.ptx
    for constant in (1 / 21, 1 / 19, 1 / 3, 1 / 6227020800, 1 / 6, 2.8853900817779268, 0.6931471805599453):
        assert f"0d{struct.pack('>d', constant).hex().upper()}" in binary.ptx, constant


def test_rows_move_in_16_byte_words(compiled: Compile) -> None:
    binary = compiled(sample(state(5000, IMAGE)))["replay_sample"]
    assert any(re.match(r"LDG.*\.128", opcode) for opcode in binary.opcodes)
    assert any(re.match(r"STG.*\.128", opcode) for opcode in binary.opcodes)
    binary = compiled(add(state(5000, IMAGE)))["replay_add"]
    assert any(re.match(r"STG.*\.128", opcode) for opcode in binary.opcodes)


def test_long_rows_are_gathered_by_a_launch_of_their_own(compiled: Compile) -> None:
    binaries = compiled(sample(state(8, (3, 224, 224))))
    assert set(binaries) == {"replay_sample", "replay_gather"}
    assert any(re.match(r"LDG.*\.128", opcode) for opcode in binaries["replay_gather"].opcodes)
    assert binaries["replay_gather"].spills == 0


def test_rebuild_compiles(compiled: Compile) -> None:
    layout = SumLayout.of(5000)
    leaves, sums = torch.zeros(5000, dtype=torch.int32), torch.zeros(layout.words, dtype=torch.int64)
    binary = compiled(lambda kernels: kernels.rebuild(leaves, sums, (layout.offsets, layout.counts)))
    assert binary["replay_rebuild"].spills == 0
