"""The last program's sum of all programs' partial losses: every one of them once, in whatever blocks they come."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import Target

pytest.importorskip("triton")

import triton

from kdfast.kernels.common.reduce import reduce_last, sum_last

BLOCK = triton.language.constexpr(64)


@triton.jit
def _sum(count, loss_ptr, partial_ptr, counter_ptr):
    sum_last(count, loss_ptr, partial_ptr, counter_ptr, BLOCK)


@triton.jit
def _each(loss_ptr, partial_ptr, counter_ptr):
    reduce_last(
        (triton.language.program_id(0) + 1).to(triton.language.float32),
        loss_ptr,
        partial_ptr,
        counter_ptr,
        BLOCK,
    )


def memory(target: Target, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, partial losses with NaN behind the last, counter."""
    partial = torch.full((count + 4 * BLOCK.value,), torch.nan, device=target.device)
    loss = torch.full((), torch.nan, device=target.device)
    return loss, partial, torch.zeros(1, dtype=torch.int32, device=target.device)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 127, 128, 129, 191, 192, 256, 300, 1000])
def test_each_partial_loss_is_summed_once(target: Target, count: int) -> None:
    if target.backend != "triton":
        pytest.skip("the reference sums otherwise")
    loss, partial, counter = memory(target, count)
    partial[:count] = torch.arange(1, count + 1)  # whole numbers: their sums are exact
    _sum[(1,)](count, loss, partial, counter)
    assert loss.item() == count * (count + 1) // 2
    assert counter.item() == 0


@pytest.mark.parametrize("programs", [1, 64, 129, 300])
def test_the_program_that_comes_last_sums(target: Target, programs: int) -> None:
    if target.backend != "triton":
        pytest.skip("the reference sums otherwise")
    loss, partial, counter = memory(target, programs)
    _each[(programs,)](loss, partial, counter)
    assert loss.item() == programs * (programs + 1) // 2
    assert counter.item() == 0
