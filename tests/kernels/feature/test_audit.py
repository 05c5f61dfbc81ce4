"""What the compiler makes of the embedding's gradient, and of noise channels last, for GPUs that are not here.

At copy speed a GPU of Hopper's kind has time for 19 lane instructions in an element of bfloat16, 39 of float32: twice
that is the budget, for a program whose timestep no other sample has. What only a split warp takes is counted, too: on
sm_80 that is half of it, channels last.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kdfast.kernels import feature
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


def drawn(
    kernel: str, dtype: torch.dtype, shape: tuple[int, ...], capability: int
) -> tuple[KernelReport, float]:
    """What draws noise for features that lie channels last; and its elements a program."""
    x = meta(*shape, dtype=dtype).to(memory_format=NHWC)
    timesteps, weights = meta(shape[0], dtype=torch.int64), meta(shape[0])

    def call() -> None:
        if kernel == "error":
            noise.noise_mse(x, 5, loss=meta(1), grad=x)
        elif kernel == "noised":
            noise.add_noise_embed(*noise.laid_out(x), timesteps, weights, meta(1280, shape[1]), x, 5)
        elif kernel == "mixed":
            feature.noise_mix(x, weights, x, 5)
        elif kernel == "mixed back":
            feature.noise_mix_backward(x, x, weights, 5, grad_x=x, want_gamma=True)
        else:
            branches, steps = torch.stack([x] * 10), meta(10)
            order, loss = meta(10, dtype=torch.int64), meta(1)
            feature.reparam_middle(
                branches, x, steps, steps, order, noise_scale=steps, loss=loss, grad=branches
            )

    (report,) = audit(call, capability)
    return report, x.numel() / (report.grid[0] * (report.grid[1] if len(report.grid) > 1 else 1))


#: DiffKD's latents, 49 positions a channel, and others'. Contiguous ones take 53 to 71.
LATENTS = [((256, 1024, 7, 7), 82), ((64, 256, 8, 8), 70), ((64, 4, 64, 64), 70)]


@pytest.mark.parametrize(("shape", "budget"), LATENTS)
def test_the_error_in_noise_costs_channels_last_what_it_costs_elsewhere(
    shape: tuple[int, ...], budget: float
) -> None:
    """Each lane that drew four normals for one would take 190."""
    report, elements = drawn("error", BF16, shape, 90)
    assert report.instructions_per_element(elements) <= budget, report
    assert report.spills == 0, report
    assert min(report.widest_load, report.widest_store) >= min(16, 2 * shape[1]), report


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("kernel", ["error", "noised", "mixed", "mixed back"])
@pytest.mark.parametrize(("shape", "budget"), LATENTS)
def test_noise_channels_last_keeps_its_budget(
    kernel: str, dtype: torch.dtype, shape: tuple[int, ...], budget: float, capability: int
) -> None:
    report, elements = drawn(kernel, dtype, shape, capability)
    assert report.instructions_per_element(elements) <= budget, report
    assert report.spills == 0, report


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("shape", "budget"), [((128, 256, 8, 8), 70), ((128, 256, 7, 7), 95)])
def test_ten_noisy_branches_channels_last(
    dtype: torch.dtype, shape: tuple[int, ...], budget: float, capability: int
) -> None:
    """A branch, with its normals: before, 157 to 168, and spills."""
    report, elements = drawn("branches", dtype, shape, capability)
    assert report.instructions_per_element(elements) / 10 <= budget, report
    assert report.spills == 0, report
