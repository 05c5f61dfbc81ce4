"""What the compiler makes of the embedding's gradient for GPUs that are not here.

At copy speed a GPU of Hopper's kind has time for 19 lane instructions in an element of bfloat16, 39 of float32: twice
that is the budget, for a program whose timestep no other sample has. What only a split warp takes is counted, too: on
sm_80 that is half of it, channels last.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kdfast.kernels.feature import noise
from tests.support.compiled import CAPABILITIES, KernelReport, audit, meta

F32, BF16 = torch.float32, torch.bfloat16
NCHW, NHWC = torch.contiguous_format, torch.channels_last
CASES = [(BF16, NCHW, 38), (BF16, NHWC, 38), (F32, NCHW, 76), (F32, NHWC, 76)]


def compiled(dtype: torch.dtype, layout: torch.memory_format, capability: int) -> tuple[KernelReport, float]:
    """For DiffKD's latents, 256 x 1024 x 7 x 7; and their elements a program."""
    x = meta(256, 1024, 7, 7, dtype=dtype).to(memory_format=layout)
    timesteps, grad = meta(256, dtype=torch.int64), meta(1280, 1024)
    x, found = noise.laid_out(x)
    (report,) = audit(lambda: noise.embedding_gradient(x, found, timesteps, grad), capability)
    return report, x.numel() / report.grid[0]


@pytest.mark.parametrize(("dtype", "layout", "budget"), CASES)
def test_the_embedding_gradient_keeps_its_budget_on_hopper(
    dtype: torch.dtype, layout: torch.memory_format, budget: float
) -> None:
    report, elements = compiled(dtype, layout, 90)
    assert report.instructions_per_element(elements) <= budget, report
    assert report.num_warps * 32 * report.registers * 7 <= 65536, report


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "layout"), [case[:2] for case in CASES])
def test_the_embedding_gradient_reads_wide_and_does_not_spill(
    dtype: torch.dtype, layout: torch.memory_format, capability: int
) -> None:
    report, _ = compiled(dtype, layout, capability)
    assert report.spills == 0, report
    assert report.widest_load == 16, report
