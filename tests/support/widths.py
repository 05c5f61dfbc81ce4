"""Whether the addresses that a kernel computes fit the integers that it computes them in, for tensors of any size.

Launchers run on ``meta`` tensors, which take no memory; the IR that Triton makes of each launch is followed from its
arguments, program numbers and ranges to its loads and stores, with an interval for every integer on the way. An
integer of 32 bits whose interval does not fit has wrapped, and an address that it goes into is wrong. So are grids
that CUDA refuses. Nothing is compiled to machine code, and nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from triton import knobs
from triton._C.libtriton import ir
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime import driver

from bench.static_audit import launching_with

#: What CUDA allows along each dimension of a grid.
GRID_LIMITS = (2**31 - 1, 65535, 65535)

Interval = tuple[int, int]


def limits(bits: int) -> Interval:
    """What a signed integer of ``bits`` holds."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


@dataclass
class Value:
    """An integer (or a tensor of them), or a pointer: what it may be, and what has gone wrong on the way to it."""

    interval: Interval
    faults: frozenset[str] = frozenset()


@dataclass
class Trace:
    """The integers of one kernel, followed line by line."""

    text: str
    arguments: list[int | None]
    grid: tuple[int, ...]
    values: dict[str, Value] = field(default_factory=dict)
    made: dict[str, tuple[str, list[str]]] = field(default_factory=dict)  # by which operation, of what
    faults: set[str] = field(default_factory=set)
    addresses: int = 0

    def run(self) -> Trace:
        names: list[str] = []
        loops: list[tuple[str, list[str]]] = []
        for line in self.text.splitlines():
            line = line.strip()
            if line.startswith("tt.func"):
                names = re.findall(r"(%\w+): (?:!tt\.ptr<|i\d+|f\d+|bf16|u?int)", line)
                kinds = re.findall(r"%\w+: ([!\w.]+)", line)
                for name, kind, given in zip(names, kinds, self.arguments, strict=True):
                    self.values[name] = Value((0, 0) if given is None else (given, given), frozenset())
                    if given is None and not kind.startswith("!tt.ptr"):
                        self.values[name] = Value(limits(64))
                continue
            if "scf.while" in line:
                # What a loop carries: anything of its type.
                for name in re.findall(r"(%\w+) = ", line.partition("scf.while")[2]):
                    self.values[name] = Value(limits(31))
            found = re.match(r"(%[\w]+)(?::\d+)? = \"?([\w.]+)\"?(.*)", line)
            if found is None:
                if line.startswith("tt.store"):
                    self._address(line)
                continue
            name, operation, rest = found.groups()
            if operation == "scf.for":
                self._loop(rest)
            elif operation in ("tt.load", "tt.atomic_rmw"):
                self._address(rest)
            if operation not in ("scf.for", "scf.while", "scf.if"):
                operands = re.findall(r"%[\w#]+", rest.rpartition(" : ")[0] or rest)
                self.made[name] = operation, operands
                self.values[name] = self._result(operation, rest, line)
                left_over = self._left_over(name)
                if left_over is not None:
                    self.values[name].interval = left_over
        # Loops without results are lines of their own.
        assert not loops
        return self

    def _operands(self, text: str) -> list[Value]:
        return [
            self.values.get(name.partition("#")[0]) or Value((0, 0)) for name in re.findall(r"%[\w#]+", text)
        ]

    def _left_over(self, name: str) -> Interval | None:
        """What ``x - x // n * n`` may be, where the intervals say that both n are one number."""
        operation, operands = self.made[name]
        if operation != "arith.subi":
            return None
        x, taken = operands
        times, factors = self.made.get(taken, ("", []))
        divided, parts = self.made.get(factors[0], ("", [])) if times == "arith.muli" else ("", [])
        if divided != "arith.divsi" or parts[0] != x:
            return None
        start, n, m = (operand.interval for operand in self._operands(" ".join((x, parts[1], factors[1]))))
        if n != m or n[0] != n[1] or n[0] <= 0:
            return None
        return self._interval("arith.remsi", "", [start, n], 32)

    def _address(self, text: str) -> None:
        self.addresses += 1
        self.faults |= self._operands(text)[0].faults

    def _loop(self, text: str) -> None:
        variable, low, high, *carried = re.findall(r"%[\w#]+", text)
        first, last = self.values.get(low), self.values.get(high)
        assert first is not None
        assert last is not None
        top = max(first.interval[0], last.interval[1] - 1)
        self.values[variable] = Value((first.interval[0], top), first.faults)
        # (step, then pairs of what is carried and what it starts as)
        for inner, start in zip(carried[1::2], carried[2::2]):
            self.values[inner] = self.values.get(start) or Value((0, 0))

    def _result(self, operation: str, rest: str, line: str) -> Value:
        kind = rest.rpartition(" : ")[2].rpartition(" to ")[2].rpartition("-> ")[2]
        width = re.search(r"(?:^|x)i(\d+)\W*$", kind.strip())
        bits = int(width[1]) if width else 0
        operands = self._operands(rest.rpartition(" : ")[0] or rest)
        faults = frozenset().union(*(value.faults for value in operands))
        if operation == "tt.addptr":
            return Value((0, 0), faults)
        if operation in ("tt.load", "tt.atomic_rmw", "tt.reduce", "tt.scan") or operation.startswith(
            "tt.extern"
        ):
            return Value(limits(bits)) if bits else Value((0, 0))
        if "!tt.ptr" in rest:  # a pointer, splat or broadcast
            return Value((0, 0), faults)
        if not bits:
            return Value((0, 0))
        interval = self._interval(operation, rest, [value.interval for value in operands], bits)
        low, high = limits(bits)
        if bits > 1 and not (low <= interval[0] and interval[1] <= high):
            faults |= {f"{operation} reaches {interval} in {bits} bits: {line}"}
            interval = (low, high)
        return Value(interval, faults)

    def _interval(self, operation: str, rest: str, given: list[Interval], bits: int) -> Interval:
        if operation == "arith.constant":
            found = re.search(r"(?:dense<)?(-?\d+|true|false)>? : ", rest)
            number = {"true": 1, "false": 0}.get(found[1]) if found else 0
            number = int(found[1]) if number is None and found else number or 0
            return number, number
        if operation == "tt.get_program_id":
            return 0, self._programs(rest) - 1
        if operation == "tt.get_num_programs":
            return self._programs(rest), self._programs(rest)
        if operation == "tt.make_range":
            ends = dict(re.findall(r"(end|start) = (\d+)", rest))
            return int(ends["start"]), int(ends["end"]) - 1
        if operation == "arith.select":
            chosen = given[1:3]
            return min(a for a, _ in chosen), max(b for _, b in chosen)
        both = {
            "arith.addi": lambda a, b: a + b,
            "arith.subi": lambda a, b: a - b,
            "arith.muli": lambda a, b: a * b,
            "arith.shli": lambda a, b: a << max(0, min(b, 64)),
            "arith.shrsi": lambda a, b: a >> max(0, min(b, 64)),
            "arith.minsi": min,
            "arith.maxsi": max,
            "arith.divsi": lambda a, b: a // b if b and a >= 0 else -(-a // b) if b else a,
            "arith.ceildivsi": lambda a, b: -(-a // b) if b else a,
        }
        if operation in both:
            (a, b), (c, d) = given
            corners = [both[operation](x, y) for x in (a, b) for y in (c, d)]
            return min(corners), max(corners)
        if operation in ("arith.remsi", "arith.remui"):
            (a, b), (_, d) = given
            top = max(0, min(b, d - 1)) if d > 0 else b
            return (0 if a >= 0 else -top), top
        if operation == "arith.andi" and len(given) == 2:
            tops = [high for low, high in given if low >= 0]
            return (0, min(tops)) if tops else limits(bits)
        if operation in (
            "tt.splat",
            "tt.broadcast",
            "tt.expand_dims",
            "tt.reshape",
            "arith.extsi",
            "tt.trans",
        ):
            return given[0]
        if operation == "arith.extui":
            return given[0] if given[0][0] >= 0 else (0, 1 << 32)
        if operation == "arith.trunci":
            return given[0]
        return limits(bits)  # anything that its type holds

    def _programs(self, rest: str) -> int:
        axis = "xyz".index(rest.strip()[0])
        return self.grid[axis] if axis < len(self.grid) else 1


def _ir_of(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, list[Any]]:
    """The launch's IR, and what its arguments hold: a number, or None for pointers and floats."""
    caught: dict[str, Any] = {}

    def hook(*, compile: dict[str, Any], **_: Any) -> bool:
        caught.update(compile)
        return True  # do not compile

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
    try:
        kernel.device_caches.clear()  # what is compiled already is not asked about
        kernel.warmup(*args, grid=grid, **kwargs)
    finally:
        knobs.runtime.jit_cache_hook = before
    target = driver.active.get_current_target()
    backend = make_backend(target)
    options = backend.parse_options({key: kwargs[key] for key in ("num_warps", "num_ctas") if key in kwargs})
    source = ASTSource(kernel, caught["signature"], caught["constants"], caught["configs"][0])
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    module = stages["ttir"](source.make_ir(target, options, codegen, modules, context), {})
    bound = dict(zip(kernel.arg_names, args)) | kwargs
    held = [bound.get(name) for name, kind in caught["signature"].items() if kind != "constexpr"]
    return module.str_nodebug(), [
        int(value) if isinstance(value, int) and not isinstance(value, bool) else None for value in held
    ]


def follow(call: Callable[[], object], capability: int = 90) -> Iterator[Trace]:
    """The launches of ``call`` (a launcher on meta tensors), each followed."""
    launches: list[tuple[Any, ...]] = []
    traces: list[Trace] = []

    def instead(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        launches.append((kernel.__name__, grid))
        text, arguments = _ir_of(kernel, grid, args, kwargs)
        traces.append(Trace(text, arguments, grid).run())

    with launching_with(instead, capability):
        call()
    assert launches, "nothing was launched"
    return iter(traces)


def faults_of(call: Callable[[], object], capability: int = 90) -> list[str]:
    """What would go wrong in the launches of ``call``: integers that wrap, and grids that CUDA refuses."""
    found: list[str] = []
    for trace in follow(call, capability):
        assert trace.addresses
        found += sorted(trace.faults)
        for size, limit in zip(trace.grid, GRID_LIMITS):
            if size > limit:
                found.append(f"grid {trace.grid}: CUDA allows {GRID_LIMITS}")
    return found


def meta(
    *shape: int, dtype: torch.dtype = torch.bfloat16, strides: tuple[int, ...] | None = None
) -> torch.Tensor:
    """A tensor with shape, strides and dtype, and no memory."""
    if strides is None:
        return torch.empty(*shape, dtype=dtype, device="meta")
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
