"""Kernels with a fault each, which the sanitizer has to find, and a reduction without one, which it must let pass.

Run by ``make sanitize`` before anything else; without the plugin there is nothing to find them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.gpu


@triton.jit
def _past_the_end(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at), mask=at < n)


@triton.jit
def _unwritten(out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(out + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def _sum(x, partial, counter, out, n, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, SEM: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial + tl.program_id(0), tl.sum(tl.load(x + at, mask=at < n, other=0.0)))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem=SEM) == tl.num_programs(0) - 1:
        tl.store(out, tl.sum(tl.load(partial + tl.arange(0, PROGRAMS))))


@triton.jit
def _one_place(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + at, mask=at < n, other=0.0)))


def fault(launch: Any) -> Any:
    """What the launch is refused for."""
    from ttsem.sanitize import KernelFault

    with pytest.raises(KernelFault) as caught:
        launch()
    return caught.value.fault


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(250, device="cuda"), torch.zeros(250, device="cuda")


def test_a_load_past_the_end_is_found() -> None:
    x, out = operands()
    found = fault(lambda: _past_the_end[(4,)](x, out, 250, BLOCK=64))
    assert (found.kind, found.buffer, found.elements_past_end) == ("oob_read", "x", 6)
    assert "tl.load(x + at)" in found.source_text


def test_two_programs_that_store_to_one_place_are_found() -> None:
    x, out = operands()
    found = fault(lambda: _one_place[(4,)](x, out, 250, BLOCK=64))
    assert (found.kind, found.buffer) == ("race", "out")


def sums(order: str) -> float:
    x, out = operands()
    partial, counter = torch.empty(4, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    _sum[(4,)](x, partial, counter, out, 250, BLOCK=64, PROGRAMS=4, SEM=order)
    return float((out[0] - x.sum()).abs())


def test_a_reduction_without_order_is_found() -> None:
    assert fault(lambda: sums("relaxed")).kind == "race"


def test_a_reduction_by_the_last_to_arrive_passes() -> None:
    assert sums("acq_rel") < 1e-4


def test_what_nobody_wrote_is_nan() -> None:
    out = torch.empty(250, device="cuda")
    _unwritten[(4,)](out, 250, BLOCK=64)
    assert bool(out.isnan().all())
