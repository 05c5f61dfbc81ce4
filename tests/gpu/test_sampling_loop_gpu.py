"""What only a GPU can show of the sampling loop: that it is captured, and what comes of replaying it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from kdfast.diffusion import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, accelerate_pipeline
from kdfast.diffusion.loop import SamplingLoop, StaticStep, class_denoiser
from kdfast.diffusion.plans import sampler_plan
from tests.support.diffusion import dit_pipeline, tiny_dit

pytestmark = pytest.mark.gpu
SHAPE = (2, 4, 8, 8)


def loop(scheduler: Any, model: Any, mode: Any, eta: float = 0.0) -> SamplingLoop:
    scheduler.set_timesteps(6, device="cuda")
    plan = sampler_plan(scheduler, "cuda", eta=eta)
    assert plan is not None
    step = StaticStep(
        class_denoiser(model),
        plan,
        SHAPE,
        device=torch.device("cuda"),
        dtype=torch.float32,
        conditions={"labels": torch.tensor([0, 3, 4, 4], device="cuda")},
        guidance_scale=2.0,
    )
    return SamplingLoop(step, mode)


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        (DDIMScheduler(clip_sample=False), 0.0),
        (DDIMScheduler(clip_sample=False), 1.0),
        (DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace", clip_sample=False), 0.0),
        (DPMSolverMultistepScheduler(solver_order=3), 0.0),
    ],
)
def test_a_captured_loop_equals_an_eager_one_again_and_again(scheduler: Any, eta: float) -> None:
    model = tiny_dit(out_channels=8).to("cuda")
    graph, eager = (loop(scheduler, model, mode, eta) for mode in ("graph", "eager"))
    for at in range(3):
        noise = torch.randn(SHAPE, device="cuda")
        labels = {"labels": torch.tensor([at, 3, 4, 4], device="cuda")}
        seeds = torch.tensor([at, at + 9], device="cuda")
        wanted = eager.run(noise, labels, seeds=seeds)
        torch.testing.assert_close(graph.run(noise, labels, seeds=seeds), wanted, rtol=1e-4, atol=1e-4)


def test_replaying_waits_for_nothing() -> None:
    made = loop(DDIMScheduler(clip_sample=False), tiny_dit().to("cuda"), "graph")
    noise, labels = torch.randn(SHAPE, device="cuda"), made.step.conditions
    made.run(noise, labels)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.run(noise, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_pipeline_makes_the_same_images() -> None:
    pipe = dit_pipeline().to("cuda")
    options = {"class_labels": [1, 2], "num_inference_steps": 4, "output_type": "pt"}
    plain = pipe(**options, generator=torch.Generator("cuda").manual_seed(0)).images
    accelerate_pipeline(pipe)
    for _ in range(2):
        made = pipe(**options, generator=torch.Generator("cuda").manual_seed(0)).images
        torch.testing.assert_close(made, plain, rtol=1e-3, atol=1e-3)


def test_memory_stays_flat_over_many_batches() -> None:
    made = loop(DDIMScheduler(clip_sample=False), tiny_dit().to("cuda"), "graph")
    noise, labels = torch.randn(SHAPE, device="cuda"), made.step.conditions
    made.run(noise, labels)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        made.run(noise, labels)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
