"""The loop over static buffers: the same images as the ordinary loop, from a step that can be captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import kdfast
from kdfast.diffusion import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from kdfast.diffusion.loop import SamplingLoop, StaticStep, class_denoiser, resolve_mode
from kdfast.diffusion.plans import fused_scheduler, sampler_plan
from kdfast.diffusion.sampling import sample_latents
from kdfast.errors import ConfigError
from tests.conftest import Target
from tests.support.diffusion import tiny_dit

SAMPLERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddim clipped": lambda: DDIMScheduler(),
    "ddim v": lambda: DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
    "ddim noisy": lambda: DDIMScheduler(clip_sample=False),
    "ddpm": lambda: DDPMScheduler(clip_sample=False),
    "ddpm learned": lambda: DDPMScheduler(
        clip_sample=False, variance_type="learned_range", timestep_spacing="linspace"
    ),
    "euler": lambda: EulerDiscreteScheduler(),
    "euler karras": lambda: EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="leading"),
    "euler ancestral": lambda: EulerAncestralDiscreteScheduler(),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
    "flow stochastic": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "dpm 1": lambda: DPMSolverMultistepScheduler(solver_order=1),
    "dpm 2": lambda: DPMSolverMultistepScheduler(),
    "dpm 2 heun": lambda: DPMSolverMultistepScheduler(solver_type="heun", lower_order_final=False),
    "dpm 3": lambda: DPMSolverMultistepScheduler(solver_order=3),
    "dpm sde": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "lcm": lambda: LCMScheduler(clip_sample=False),
    "lcm clipped": lambda: LCMScheduler(clip_sample=True),
}
SHAPE = (2, 4, 8, 8)


def eta_of(name: str) -> float:
    return 0.7 if name == "ddim noisy" else 0.0


def static_step(scheduler: Any, model: Any, scale: float | None = 2.0, **options: Any) -> StaticStep:
    plan = sampler_plan(scheduler, "cpu", eta=options.pop("eta", 0.0))
    assert plan is not None
    rows = SHAPE[0] * (1 if scale is None else 2)
    return StaticStep(
        class_denoiser(model),
        plan,
        SHAPE,
        device=torch.device("cpu"),
        dtype=options.pop("dtype", torch.float32),
        conditions={"labels": torch.zeros(rows, dtype=torch.long)},
        guidance_scale=scale,
        **options,
    )


def labels(scale: float | None) -> dict[str, Tensor]:
    return {"labels": torch.tensor([0, 3] if scale is None else [0, 3, 4, 4])}


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_it_ends_in_the_ordinary_loops_latents(name: str, scale: float | None) -> None:
    model, noise = tiny_dit(out_channels=8), torch.randn(SHAPE)
    scheduler = SAMPLERS[name]()
    scheduler.set_timesteps(6)
    draws = torch.Generator().manual_seed(3)

    wanted = sample_latents(
        model,
        scheduler,
        noise,
        torch.tensor([0, 3]),
        guidance_scale=1.0 if scale is None else scale,
        null_class=4,
        eta=eta_of(name),
        generators=torch.Generator().manual_seed(3),  # type: ignore[arg-type]
    )
    scheduler.set_timesteps(6)
    loop = SamplingLoop(static_step(scheduler, model, scale, eta=eta_of(name), seeded=False))
    got = loop.run(noise, labels(scale), draw=lambda: torch.randn(SHAPE, generator=draws))
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4 * float(wanted.abs().max()))


def test_a_step_moves_no_buffer_and_reads_no_host() -> None:
    """What a capture needs: the same memory at every step, and nothing brought to the host in between."""
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(5)
    step = static_step(scheduler, tiny_dit())
    step.begin(torch.randn(SHAPE), labels(2.0), torch.tensor([1, 2]))

    def addresses() -> list[int]:
        buffers = [step.latents, step.model_input, step.counter, step.seeds, *step.history]
        return [b.data_ptr() for b in [*buffers, *step.conditions.values()] if b is not None]

    before = addresses()
    for number in range(5):
        assert int(step.counter) == number
        step()
    assert addresses() == before


@pytest.mark.parametrize("name", ["ddpm learned", "dpm sde", "ddim noisy"])
def test_noise_on_the_device_belongs_to_the_seed_and_not_to_the_place(name: str) -> None:
    scheduler = SAMPLERS[name]()
    scheduler.set_timesteps(4)
    loop = SamplingLoop(static_step(scheduler, tiny_dit(out_channels=8), None, eta=eta_of(name)))
    noise, seeds = torch.randn(SHAPE), torch.tensor([11, 22])
    both = loop.run(noise, labels(None), seeds=seeds)
    turned = loop.run(noise.flip(0), {"labels": torch.tensor([3, 0])}, seeds=seeds.flip(0))
    torch.testing.assert_close(turned.flip(0), both, rtol=1e-4, atol=1e-4)
    other = loop.run(noise, labels(None), seeds=seeds + 1)
    assert not torch.allclose(other, both, atol=1e-2)


@pytest.mark.parametrize("name", ["ddim noisy", "ddpm learned", "dpm 3", "dpm sde", "euler", "lcm"])
def test_the_kernels_walk_the_references_path(name: str, target: Target) -> None:
    """Buffers, guidance, history, a seed for each row and the next model input, as a GPU would run them."""

    def denoiser(x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        output = torch.cos(x.float() * 3 + conditions["shift"][:, None, None, None])
        return torch.cat([output, 0.1 * output], 1)  # further channels: a variance

    shape = (2, 2, 3, 4)
    scheduler = SAMPLERS[name]()
    scheduler.set_timesteps(4)
    plan = sampler_plan(scheduler, target.device, eta=eta_of(name))
    assert plan is not None
    shift = {"shift": torch.arange(4.0, device=target.device)}
    device = torch.device(target.device)
    noise, seeds = torch.randn(shape, device=device), torch.tensor([3, 2**40], device=device)
    made = []
    for backend in (target.backend, "reference"):
        with kdfast.use_backend(backend):
            step = StaticStep(
                denoiser,
                plan,
                shape,
                device=device,
                dtype=torch.float32,
                conditions=shift,
                guidance_scale=2.0,
            )
            made.append(SamplingLoop(step, "eager").run(noise, shift, seeds=seeds))
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-4 * float(made[1].abs().max()))


def test_a_loop_can_be_run_again_and_its_result_is_kept() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(4)
    loop = SamplingLoop(static_step(scheduler, tiny_dit()))
    noise = torch.randn(SHAPE)
    first = loop.run(noise, labels(2.0))
    kept = first.clone()
    loop.run(noise + 1, labels(2.0))
    assert torch.equal(first, kept)
    assert torch.equal(loop.run(noise, labels(2.0)), kept)


def test_a_low_precision_model_sees_its_dtype_and_latents_stay_wide() -> None:
    seen: list[torch.dtype] = []

    def denoiser(x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        seen.append(x.dtype)
        return x

    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    plan = sampler_plan(scheduler, "cpu")
    assert plan is not None
    step = StaticStep(denoiser, plan, SHAPE, device=torch.device("cpu"), dtype=torch.bfloat16, conditions={})
    steps: list[int] = []
    result = SamplingLoop(step).run(torch.randn(SHAPE), {}, on_step=lambda: steps.append(1))
    assert (set(seen), result.dtype, len(steps)) == ({torch.bfloat16}, torch.float32, 3)


def test_samplers_without_a_linear_step_have_no_plan() -> None:
    for scheduler in (
        DDIMScheduler(thresholding=True, sample_max_value=2.0),
        DDPMScheduler(variance_type="learned"),
        DPMSolverMultistepScheduler(
            thresholding=True, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
        ),
        diffusers.DDIMScheduler(),
    ):
        scheduler.set_timesteps(3)
        assert sampler_plan(scheduler, "cpu") is None


def test_dynamic_thresholding_at_one_is_a_clamp() -> None:
    scheduler = DDIMScheduler(thresholding=True, sample_max_value=1.0, clip_sample=False)
    scheduler.set_timesteps(3)
    plan = sampler_plan(scheduler, "cpu")
    assert plan is not None
    assert plan.clip == 1.0


def test_every_kind_is_swapped_for_its_namesake() -> None:
    theirs = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    ours = fused_scheduler(theirs)
    assert type(ours) is EulerDiscreteScheduler
    assert ours.config.use_karras_sigmas
    assert fused_scheduler(ours) is ours
    with pytest.raises(ConfigError, match=r"got diffusers\..*PNDMScheduler, accepted: DDIMScheduler, DDPM"):
        fused_scheduler(diffusers.PNDMScheduler())


def test_modes_that_cannot_be_are_refused() -> None:
    assert resolve_mode("auto", torch.device("cpu")) == "eager"
    assert resolve_mode("auto", torch.device("cuda")) == "graph"
    with pytest.raises(ConfigError, match="mode: got 'graph' on cpu"):
        resolve_mode("graph", torch.device("cpu"))
    with pytest.raises(ConfigError, match="mode: got 'fast', accepted: auto, graph, compile, eager"):
        resolve_mode("fast", torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_compiled_denoiser_gives_the_same_latents() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(3)
    model, noise = tiny_dit(), torch.randn(SHAPE)
    eager, compiled = (
        SamplingLoop(static_step(scheduler, model), mode).run(noise, labels(2.0))
        for mode in ("eager", "compile")
    )
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_a_loop_that_was_made_in_inference_mode_runs_outside() -> None:
    model, scheduler = tiny_dit(), DDIMScheduler()
    scheduler.set_timesteps(3)
    with torch.inference_mode():
        step = static_step(scheduler, model)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inside = SamplingLoop(step, "eager").run(noise, labels(2.0))
        outside = SamplingLoop(static_step(scheduler, model), "eager").run(noise, labels(2.0))
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
