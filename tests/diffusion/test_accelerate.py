"""Accelerated pipelines: the same images at the same seeds, every call still taken, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from kdfast.diffusion import DDIMScheduler, accelerate_pipeline, restore_pipeline
from kdfast.diffusion import accelerate as module
from kdfast.errors import ConfigError
from tests.support.diffusion import dit_pipeline, stable_diffusion

DIT = {"class_labels": [1, 700, 3], "num_inference_steps": 4, "output_type": "pt"}
TEXT = {"prompt": ["a cat", "a dog!"], "num_inference_steps": 4, "output_type": "pt"}
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    "euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
}


def images(pipe: Any, options: dict[str, Any], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)  # diffusers' DiTPipeline hands its generator to no scheduler
    return pipe(**options, generator=torch.Generator().manual_seed(seed)).images


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the runs of our loop."""
    runs: list[int] = []
    run = module.SamplingLoop.run
    monkeypatch.setattr(module.SamplingLoop, "run", lambda *a, **k: (runs.append(1), run(*a, **k))[1])
    return runs


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_dit_makes_the_same_images(name: str, scale: float, loops: list[int]) -> None:
    pipe = dit_pipeline(SCHEDULERS[name]())
    options = {**DIT, "guidance_scale": scale}
    wanted = images(pipe, options)
    assert accelerate_pipeline(pipe) is pipe
    got = images(pipe, options)
    # diffusers' DiTPipeline steps from the scaled model input of samplers in σ; that is left to its own loop.
    assert loops == ([] if "euler" in name else [1])
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4)
    assert float(wanted.std()) > 0.02
    assert not torch.allclose(images(pipe, options, seed=1), wanted, atol=1e-2)


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_makes_the_same_images(
    name: str, scale: float, tmp_path: Path, loops: list[int]
) -> None:
    pipe = stable_diffusion(tmp_path, SCHEDULERS[name]())
    options = {**TEXT, "guidance_scale": scale, "eta": 0.5 if name == "ddim" else 0.0}
    wanted = images(pipe, options)
    got = images(accelerate_pipeline(pipe), options)
    assert loops == [1]
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4)


def test_every_way_of_asking_stable_diffusion_stays(tmp_path: Path, loops: list[int]) -> None:
    pipe = stable_diffusion(tmp_path)
    embeds, negative = pipe.encode_prompt("a cat", "cpu", 1, True)
    for options in (
        {"prompt": "a cat", "negative_prompt": "rain", "num_images_per_prompt": 2},
        {"prompt": "a cat", "height": 24, "width": 16, "output_type": "latent"},
        {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "clip_skip": None, "output_type": "np"},
        {"prompt": "a cat", "latents": torch.randn(1, 4, 8, 8)},
    ):
        asked = {**{k: v for k, v in TEXT.items() if k != "prompt"}, **options}
        wanted = torch.as_tensor(images(pipe, asked))
        accelerate_pipeline(pipe)
        got = torch.as_tensor(images(pipe, asked))
        restore_pipeline(pipe)
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4)
    assert len(loops) == 4


def test_pictures_and_tuples_come_as_before(tmp_path: Path) -> None:
    dit = accelerate_pipeline(dit_pipeline())
    [picture] = dit([5], num_inference_steps=2, return_dict=False)[0]
    assert picture.size == (16, 16)
    text = accelerate_pipeline(stable_diffusion(tmp_path))
    pictures, unsafe = text("a cat", num_inference_steps=2, return_dict=False)
    assert pictures[0].size == (16, 16)
    assert unsafe is None


def test_what_the_loop_has_no_part_for_goes_to_the_pipelines_own(tmp_path: Path, loops: list[int]) -> None:
    pipe = stable_diffusion(tmp_path)
    seen: list[int] = []

    def watch(_: Any, at: int, *rest: Any) -> dict[str, Any]:
        seen.append(at)
        return {}

    for options in (
        {"callback_on_step_end": watch},
        {"guidance_rescale": 0.5},
    ):
        wanted = images(pipe, {**TEXT, **options})
        got = images(accelerate_pipeline(pipe), {**TEXT, **options})
        restore_pipeline(pipe)
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4)
    assert seen == [0, 1, 2, 3] * 2
    assert loops == []
    thresholding = diffusers.DDIMScheduler(thresholding=True, sample_max_value=2.0, clip_sample=False)
    odd = dit_pipeline(thresholding)
    wanted = images(odd, DIT)
    torch.testing.assert_close(images(accelerate_pipeline(odd), DIT), wanted, rtol=0, atol=2e-4)
    assert loops == []


def test_wrong_calls_are_refused_in_the_pipelines_words(tmp_path: Path) -> None:
    pipe = accelerate_pipeline(stable_diffusion(tmp_path))
    with pytest.raises(ValueError, match="divisible by 8"):
        pipe("a cat", height=13, width=13)
    with pytest.raises(TypeError, match="nonsense"):
        accelerate_pipeline(dit_pipeline())([1], nonsense=1)


def test_it_can_be_done_twice_and_undone() -> None:
    pipe = dit_pipeline()
    kind, scheduler = type(pipe), pipe.scheduler
    wanted = images(pipe, DIT)
    accelerate_pipeline(pipe)
    ours = pipe.scheduler
    assert type(ours) is DDIMScheduler
    assert isinstance(pipe, diffusers.DiTPipeline)
    accelerate_pipeline(pipe, mode="eager")
    assert pipe.scheduler is ours
    torch.testing.assert_close(images(pipe, DIT), wanted, rtol=0, atol=2e-4)
    assert restore_pipeline(restore_pipeline(pipe)) is pipe
    assert (type(pipe), pipe.scheduler) == (kind, scheduler)
    assert torch.equal(images(pipe, DIT), wanted)


def test_a_saved_one_loads_without_us(tmp_path: Path) -> None:
    pipe = accelerate_pipeline(dit_pipeline())
    pipe.save_pretrained(tmp_path / "saved")
    assert type(pipe.scheduler) is DDIMScheduler  # and goes on as before
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(again) is diffusers.DiTPipeline
    assert type(again.scheduler) is diffusers.DDIMScheduler
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(images(pipe, DIT), images(again, DIT), rtol=0, atol=2e-4)


def test_loops_are_kept_by_shape_and_not_without_end() -> None:
    pipe = accelerate_pipeline(dit_pipeline())
    kept = pipe.__dict__["_kdfast_accelerated"].loops
    for labels in ([1], [2], [3, 4]):
        pipe(labels, num_inference_steps=2, output_type="pt")
    assert len(kept) == 2
    for steps in range(2, 9):
        pipe([1], num_inference_steps=steps, output_type="pt")
    assert len(kept) == 4


def test_a_model_that_hooks_move_is_never_captured() -> None:
    pipe = accelerate_pipeline(dit_pipeline(), mode="compile")
    pipe.transformer._hf_hook = object()
    pipe([1], num_inference_steps=2, output_type="pt")
    [loop] = pipe.__dict__["_kdfast_accelerated"].loops.values()
    assert loop.mode == "eager"


def test_what_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pipe: got .*DDPMPipeline, accepted: DiTPipeline or StableDiff"):
        accelerate_pipeline(diffusers.DDPMPipeline(None, diffusers.DDPMScheduler()))
    with pytest.raises(ConfigError, match=r"pipe: got builtins\.str"):
        accelerate_pipeline("DiT")
    pipe = stable_diffusion(tmp_path, diffusers.PNDMScheduler(skip_prk_steps=True))
    with pytest.raises(ConfigError, match=r"got .*PNDMScheduler, accepted: DDIMScheduler"):
        accelerate_pipeline(pipe)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    with pytest.raises(ConfigError, match="mode: got 'graph' on cpu"):
        accelerate_pipeline(dit_pipeline(), mode="graph")
