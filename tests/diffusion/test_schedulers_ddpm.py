"""DDPMScheduler against diffusers' own."""

from __future__ import annotations

import inspect
import itertools
import random
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from kdfast.diffusion import DDPMScheduler  # noqa: E402
from tests.conftest import INTERPRETING, Target  # noqa: E402
from tests.diffusion.test_schedulers_ddim import deviation, inputs  # noqa: E402

GRID = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"],
    "clip_sample": [True, False],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "rescale_betas_zero_snr": [True, False],
    "num_inference_steps": [5, 50],
}
CASES = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]


def pair(**config: Any) -> tuple[Any, Any]:
    return diffusers.DDPMScheduler(**config), DDPMScheduler(**config)


def operands(variance_type: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    sample, output, variance = inputs(dtype)
    if variance_type == "learned":
        return sample, torch.cat([output, variance.abs()], 1)
    return sample, torch.cat(
        [output, variance.clamp(-1, 1)], 1
    ) if variance_type == "learned_range" else output


def check(case: dict[str, Any], dtype: torch.dtype, tolerance: float, target: Target | None = None) -> None:
    case = dict(case)
    steps = case.pop("num_inference_steps")
    device = target.device if target else "cpu"
    theirs, ours = pair(**case)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps, device=device)
    sample, output = operands(case["variance_type"], dtype)
    for at in (0, steps // 2, -1):
        t = theirs.timesteps[at]
        made = [torch.Generator().manual_seed(3) for _ in range(2)]
        want = theirs.step(output, t, sample, generator=made[0])
        got = ours.step(output.to(device), int(t), sample.to(device), generator=made[1])
        assert torch.equal(made[0].get_state(), made[1].get_state()), "drew differently"
        infinite = want.prev_sample.isinf()
        # ε at zero terminal SNR without a clip: infinite or undefined in diffusers, huge here.
        if not infinite.any() and not want.prev_sample.isnan().any():
            assert deviation(got.prev_sample.cpu(), want.prev_sample) <= tolerance, (t, "prev_sample")
            loose = tolerance * (1 if dtype == torch.float64 else 3)
            assert deviation(got.pred_original_sample.cpu(), want.pred_original_sample) <= loose, (t, "x0")


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_random_part_of_the_grid(dtype: torch.dtype, tolerance: float) -> None:
    for case in random.Random(0).sample(CASES, 100):
        try:
            check(case, dtype, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_whole_grid(dtype: torch.dtype, tolerance: float) -> None:
    for case in CASES:
        try:
            check(case, dtype, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_the_grid_runs_on_the_kernel(target: Target) -> None:
    for case in random.Random(1).sample(CASES, 4 if INTERPRETING else 20):
        check(case, torch.float32, 1e-6, target)


def test_no_case_of_the_grid_uses_the_step_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("super().step was called")

    monkeypatch.setattr(diffusers.DDPMScheduler, "step", forbidden)
    for case in [*random.Random(2).sample(CASES, 40), {"thresholding": True, **CASES[0]}]:
        case = dict(case)
        steps = case.pop("num_inference_steps")
        ours = DDPMScheduler(**case)
        ours.set_timesteps(steps)
        sample, output = operands(case["variance_type"], torch.float32)
        ours.step(output, ours.timesteps[0], sample)


def test_a_whole_loop_with_a_learned_range() -> None:
    """The sampler of DM-KD's images: linear schedule, respaced, learned range, no clip."""
    config = {
        "beta_schedule": "linear", "variance_type": "learned_range", "timestep_spacing": "linspace",
        "clip_sample": False,
    }  # fmt: skip
    results = []
    for scheduler in pair(**config):
        scheduler.set_timesteps(25)
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)
        for t in scheduler.timesteps:
            output = torch.cat([torch.tanh(sample), torch.sin(sample)], 1)
            sample = scheduler.step(output, t, sample, generator=generator).prev_sample
        results.append(sample)
    assert deviation(results[1], results[0]) <= 1e-12


def test_step_cfg_with_a_learned_range(target: Target) -> None:
    theirs, ours = pair(variance_type="learned_range", clip_sample=False)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    output, sample = (inputs(torch.float32, shape)[0] for shape in ((4, 8, 3, 4), (2, 4, 3, 4)))
    cond, uncond = output.chunk(2)
    guided = uncond[:, :3] + 2.0 * (cond[:, :3] - uncond[:, :3])
    single = torch.cat([guided, cond[:, 3:]], 1)  # channel 3 and the variance come from the conditional half
    want = theirs.step(single, 500, sample, generator=torch.Generator().manual_seed(4)).prev_sample
    got = ours.step_cfg(
        output.to(target.device), 500, sample.to(target.device), 2.0, cfg_channels=3,
        generator=torch.Generator().manual_seed(4),
    ).prev_sample  # fmt: skip
    assert deviation(got.cpu(), want) <= 1e-6


def test_step_cfg_of_a_doubled_sample_draws_for_each_row() -> None:
    theirs, ours = pair(clip_sample=False)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    output, sample = (inputs(torch.float32, shape)[0] for shape in ((4, 4, 3, 4), (4, 4, 3, 4)))
    cond, uncond = output.chunk(2)
    guided = uncond + 2.0 * (cond - uncond)
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    want = theirs.step(torch.cat([guided, guided]), 500, sample, generator=generators[0]).prev_sample
    got = ours.step_cfg(output, 500, sample, 2.0, generator=generators[1]).prev_sample
    assert deviation(got, want) <= 1e-6


def test_before_set_timesteps_and_with_custom_timesteps() -> None:
    theirs, ours = pair()
    sample, output, _ = inputs()
    for _ in range(2):
        for t in (999, 500, 0):
            generators = [torch.Generator().manual_seed(4) for _ in range(2)]
            want = theirs.step(output, t, sample, generator=generators[0]).prev_sample
            assert deviation(ours.step(output, t, sample, generator=generators[1]).prev_sample, want) <= 1e-13
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(timesteps=[999, 500, 100, 0])


def test_the_log_of_the_large_variance_is_a_number() -> None:
    ours = DDPMScheduler(variance_type="fixed_large_log")
    large = DDPMScheduler(variance_type="fixed_large")
    sample, output, _ = inputs()
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    got = ours.step(output, 500, sample, generator=generators[0]).prev_sample
    assert torch.equal(got, large.step(output, 500, sample, generator=generators[1]).prev_sample)


def test_thresholding() -> None:
    for maximum in (1.0, 2.0):
        theirs, ours = pair(thresholding=True, sample_max_value=maximum, variance_type="fixed_large")
        sample, output, _ = inputs()
        generators = [torch.Generator().manual_seed(4) for _ in range(2)]
        want = theirs.step(output, 500, sample, generator=generators[0]).prev_sample
        assert deviation(ours.step(output, 500, sample, generator=generators[1]).prev_sample, want) <= 1e-13


def test_signature_and_round_trip(tmp_path: Any) -> None:
    ours, theirs = (
        inspect.signature(cls.step).parameters for cls in (DDPMScheduler, diffusers.DDPMScheduler)
    )
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}
    DDPMScheduler(variance_type="learned_range").save_pretrained(tmp_path)
    assert DDPMScheduler.from_pretrained(tmp_path).config.variance_type == "learned_range"
    assert DDPMScheduler.from_pretrained(tmp_path).variance_type == "learned_range"


def test_refusals() -> None:
    ours = DDPMScheduler()
    sample, output, _ = inputs(torch.float32)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match="one of the scheduler's timesteps, got 501"):
        ours.step(output, 501, sample)
    with pytest.raises(ValueError, match="timesteps, got 1000"):
        ours.step(output, 1000, sample)
    with pytest.raises(ValueError, match="has 6 channels for a sample of 3"):
        ours.step(torch.cat([output, output], 1), 500, sample)
    learned = DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="two channels for each"):
        learned.step(output, 500, sample)
    with pytest.raises(ValueError, match="variance_noise and seed"):
        ours.step_cfg(torch.cat([output, output]), 500, sample, 2.0, variance_noise=sample, seed=1)
    predicted = DDPMScheduler(variance_type="learned")
    with pytest.raises(ValueError, match="seed"):
        predicted.step_cfg(torch.zeros(4, 6, 4, 4), 500, sample, 2.0, seed=1)
    with pytest.raises(ValueError, match="prediction_type"):
        DDPMScheduler(prediction_type="score").step(output, 500, sample)
    with pytest.raises(ValueError, match="variance_type"):
        DDPMScheduler(variance_type="none").step(output, 500, sample)
