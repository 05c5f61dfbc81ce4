"""What the compiler makes of the statistics' kernels for GPUs that are not here: loads in flight, registers.

A program that waits for each tile before it asks for the next takes a latency a tile: 16 of them on DiffKD's latents.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from bench.audit_feature import batch_norm
from bench.audit_table import _statistics
from kdfast.kernels.norm.plan import Matrix, reduce_plan
from kdfast.kernels.norm.statistics_loss import PLANE_PROGRAMS, statistics_plan
from tests.support.compiled import CAPABILITIES, KernelReport, audit

F32, BF16 = torch.float32, torch.bfloat16


def tiles_ahead(report: KernelReport, tile_bytes: int) -> int:
    """Tiles that are asked for before the loop over them begins, by its asynchronous copies of 16 bytes a thread."""
    copies = report.loads["LDGSTS.E.BYPASS.128"]
    each = tile_bytes // (16 * 32 * report.num_warps)
    assert copies % each == 0, report
    return copies // each - 1  # the loop has one more


def check(call: Callable[[], object], capability: int, tile: int, ahead: int, programs: int) -> None:
    report = next(r for r in audit(call, capability) if r.name == "bn_statistics_kernel")
    assert report.spills == 0, report
    assert tiles_ahead(report, tile) == ahead, report
    # What is in flight fits in what the loop was given, and as many programs in a multiprocessor.
    assert report.shared >= ahead * tile, report
    assert report.num_warps * 32 * report.registers * programs <= 65536, report


# of x alone 1024 elements a tile, of x and t twice that; tiles ahead; programs a multiprocessor
CASES = {
    "BN bf16": (batch_norm("act", BF16), 2048, 3, 8),
    "BN fp32": (batch_norm("act", F32), 4096, 3, 8),
    "BN bf16, channels_last": (batch_norm("act", BF16, channels_last=True), 2048, 3, 8),
    "BN + error bf16": (batch_norm("mse", BF16), 4096, 2, 7),
    "BN + error bf16, channels_last": (batch_norm("mse", BF16, channels_last=True), 4096, 2, 6),
    "loss bf16": (_statistics((256, 64, 32, 32), BF16), 4096, 3, 8),
    "loss fp32": (_statistics((256, 64, 32, 32), F32), 8192, 3, 8),
    "loss fp32, two tiles a program": (_statistics((256, 512, 4, 4), F32), 8192, 2, 7),
    "loss bf16, channels_last": (_statistics((256, 64, 32, 32), BF16, nhwc=True), 4096, 3, 6),
}


@pytest.mark.parametrize("name", ["BN bf16", "BN bf16, channels_last", "loss bf16"])
def test_tiles_are_in_flight_on_hopper(name: str) -> None:
    call, tile, ahead, programs = CASES[name]
    check(call, 90, tile, ahead, programs)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_tiles_are_in_flight(name: str, capability: int) -> None:
    call, tile, ahead, programs = CASES[name]
    check(call, capability, tile, ahead, programs)


@pytest.mark.parametrize("channels", [16, 64, 100, 256, 511, 512, 1024, 2048, 4096])
def test_channels_last_fills_a_gpu_and_leaves_the_last_program_its_registers(channels: int) -> None:
    """512 programs or more of a large input; a last program that combines 2048 numbers at once."""
    plan = reduce_plan(Matrix(256 * 56 * 56, channels, 1))
    blocks = -(-channels // plan.channels)
    assert plan.channels * plan.parts <= 2048
    assert blocks * plan.parts >= (128 if channels < 64 else 512)
    assert plan.per * plan.parts >= plan.steps


def test_where_programs_are_many_nothing_is_copied_ahead() -> None:
    """They hide each other's loads, and registers for copies would leave room for fewer of them."""
    assert statistics_plan(256, 4 * PLANE_PROGRAMS, 49, 2, False).stages == 1
    assert statistics_plan(256, 64, 1024, 2, False).stages == 4
    assert statistics_plan(2, 64, 16, 2, False).stages == 2  # a single tile
