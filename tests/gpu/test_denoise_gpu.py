"""What only a GPU can show of the denoising step: no synchronisation, and graph capture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("diffusers")

import kdfast
from kdfast.diffusion import DDIMScheduler, DDPMScheduler
from kdfast.kernels.launch import count_launches

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scheduler_type", [DDIMScheduler, DDPMScheduler])
def test_fifty_steps_without_a_synchronisation(scheduler_type: type, no_synchronisation: None) -> None:
    scheduler = scheduler_type()
    scheduler.set_timesteps(50, device="cuda")
    sample = torch.randn(4, 4, 16, 16, device="cuda")
    output = torch.randn(8, 4, 16, 16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    more = {"eta": 1.0} if scheduler_type is DDIMScheduler else {}
    # The first step builds the table; nothing after it may wait.
    scheduler.step_cfg(output, scheduler.timesteps[0], sample, 2.0, generator=generator, **more)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    with count_launches() as counts:
        for t in scheduler.timesteps:
            sample = scheduler.step_cfg(output, t, sample, 2.0, generator=generator, **more).prev_sample
    torch.cuda.set_sync_debug_mode("default")
    assert sum(counts.values()) == 50
    assert sample.isfinite().all()


def test_a_captured_step_follows_timestep_and_seed() -> None:
    """One graph, replayed with another timestep and seed in device memory, equals eager steps."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10, device="cuda")
    sample, output = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(4, 8, 8, 8, device="cuda")
    t, seed = torch.tensor(900, device="cuda"), torch.tensor(1, device="cuda")

    def step() -> torch.Tensor:
        return scheduler.step_cfg(output, t, sample, 2.0, eta=1.0, seed=seed).prev_sample

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles, and builds the table
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for at, key in ((900, 1), (500, 1), (500, 2)):
        t.fill_(at)
        seed.fill_(key)
        graph.replay()
        assert torch.equal(captured, step())


def test_cuda_agrees_with_the_reference() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    sample, output = torch.randn(2, 4, 64, 64, device="cuda"), torch.randn(4, 8, 64, 64, device="cuda")
    for layout in (torch.contiguous_format, torch.channels_last):
        operands = [tensor.contiguous(memory_format=layout) for tensor in (output, sample)]
        got = scheduler.step_cfg(operands[0], 500, operands[1], 2.0, eta=1.0, seed=3).prev_sample
        with kdfast.use_backend("reference"):
            want = scheduler.step_cfg(operands[0], 500, operands[1], 2.0, eta=1.0, seed=3).prev_sample
        assert got.stride() == operands[1].stride()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
