"""Our schedulers in other people's code: saved pipelines, one channel, the end of a schedule, zero terminal SNR."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from kdfast import diffusion as ours  # noqa: E402

NAMES = [name for name in ours.__all__ if name.endswith("Scheduler")]


class Pipe(diffusers.DiffusionPipeline):  # type: ignore[misc, name-defined]
    """Nothing but a scheduler."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_with_our_scheduler_survives_saving(name: str, tmp_path: Path) -> None:
    made = getattr(ours, name)()
    Pipe(made).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", name]  # which anybody can load
    plain = Pipe.from_pretrained(tmp_path).scheduler
    assert type(plain) is getattr(diffusers, name)
    again = getattr(ours, name).from_pretrained(tmp_path, subfolder="scheduler")
    passed = Pipe.from_pretrained(tmp_path, scheduler=again)
    assert passed.scheduler is again
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(copied) is type(made)
    assert type(made).__module__.startswith("kdfast.")


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("t", [0, 500])
def test_a_learned_variance_of_one_channel(variance: str, t: int) -> None:
    torch.manual_seed(0)
    sample, output = torch.randn(2, 1, 4, 4), torch.rand(2, 2, 4, 4)
    results = []
    for library in (diffusers, ours):
        scheduler = library.DDPMScheduler(variance_type=variance, clip_sample=False)
        made = scheduler.step(output, t, sample, generator=torch.Generator().manual_seed(1)).prev_sample
        results.append(made)
    assert results[1].shape == sample.shape
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_a_step_past_the_end_is_refused() -> None:
    made = ours.DPMSolverMultistepScheduler(use_karras_sigmas=True, solver_order=3)
    made.set_timesteps(100)
    sample = torch.randn(1, 4, 2, 2)
    made.set_begin_index(98)
    for t in made.timesteps[98:]:
        sample = made.step(torch.sin(sample), t, sample).prev_sample
    with pytest.raises(ValueError, match=r"step 100 of 100.*set_timesteps"):
        made.step(sample, made.timesteps[-1], sample)


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"]
)
def test_every_scheduler_that_counts_its_steps_refuses_one_too_many(name: str) -> None:
    made = getattr(ours, name)()
    made.set_timesteps(4)
    sample = torch.randn(1, 4, 2, 2)
    for t in made.timesteps:
        sample = made.step(torch.sin(sample), t, sample).prev_sample
    with pytest.raises(ValueError, match="step 4 of 4"):
        made.step(sample, made.timesteps[-1], sample)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_a_spacing_that_ends_before_the_first_timestep_is_refused_when_it_is_set(name: str) -> None:
    made = getattr(ours, name)(timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"num_inference_steps: got 61.*trailing.*−1"):
        made.set_timesteps(61)
    made.set_timesteps(60)
    assert int(made.timesteps.min()) >= 0


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler"])
def test_noise_says_nothing_of_an_image_that_is_all_noise(name: str) -> None:
    made = getattr(ours, name)(rescale_betas_zero_snr=True, clip_sample=False, timestep_spacing="trailing")
    made.set_timesteps(4)
    x, o = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    with pytest.warns(UserWarning, match="epsilon.*zero terminal SNR.*v_prediction"):
        result = made.step(o, 999, x, return_dict=False)[0]
    assert not result.isfinite().any()
