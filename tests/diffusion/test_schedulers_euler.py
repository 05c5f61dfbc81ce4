"""The Euler samplers and LCM against diffusers' own, over whole loops (they count steps)."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from kdfast import diffusion  # noqa: E402
from tests.conftest import INTERPRETING, Target  # noqa: E402
from tests.diffusion.test_schedulers_ddim import deviation, inputs  # noqa: E402


def product(**axes: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
SPACINGS = ["leading", "trailing", "linspace"]
GRIDS = {
    "EulerDiscreteScheduler": product(
        beta_schedule=SCHEDULES,
        prediction_type=["epsilon", "sample", "v_prediction"],
        timestep_spacing=SPACINGS,
        use_karras_sigmas=[False, True],
        rescale_betas_zero_snr=[False, True],
        final_sigmas_type=["zero", "sigma_min"],
    ),
    "EulerAncestralDiscreteScheduler": product(
        beta_schedule=SCHEDULES,
        prediction_type=["epsilon", "v_prediction"],
        timestep_spacing=SPACINGS,
        rescale_betas_zero_snr=[False, True],
    ),
    "FlowMatchEulerDiscreteScheduler": product(
        shift=[1.0, 3.0],
        stochastic_sampling=[False, True],
        use_karras_sigmas=[False, True],
        invert_sigmas=[False, True],
    ),
    "LCMScheduler": product(
        beta_schedule=SCHEDULES,
        prediction_type=["epsilon", "sample", "v_prediction"],
        clip_sample=[False, True],
        rescale_betas_zero_snr=[False, True],
        timestep_scaling=[10.0, 1.0],
    ),
}
CASES = [(name, case) for name, cases in GRIDS.items() for case in cases]


def pair(name: str, **config: Any) -> tuple[Any, Any]:
    return getattr(diffusers, name)(**config), getattr(diffusion, name)(**config)


def model(sample: torch.Tensor) -> torch.Tensor:
    return torch.sin(3 * sample)


def blown_up(scheduler: Any, t: torch.Tensor, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """What one rounding of x - σ·ε in float32 becomes where it is divided by √ᾱ: only LCM's x₀ is made so.

    At t = 959 of 20 steps with rescaled betas √ᾱ is 0.0194, and CPUs with and without fused multiplications differ by
    2.7e-6 of a result of 1.
    """
    if not isinstance(scheduler, diffusers.LCMScheduler) or scheduler.config["prediction_type"] != "epsilon":
        return torch.zeros(())
    root = scheduler.alphas_cumprod[int(t)].clamp(min=1e-6).sqrt()
    terms = sample.abs().max() + output.abs().max()
    return 2**-24 * terms.float().nan_to_num(0.0, posinf=0.0) / root


def compare(
    name: str,
    case: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    steps: int = 5,
    device: str = "cpu",
    **more: Any,
) -> None:
    """Both schedulers from the same sample at every step of a loop that diffusers leads."""
    theirs, ours = pair(name, **case)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps, device=device)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    sample = inputs(dtype)[0]
    if hasattr(theirs, "init_noise_sigma"):
        sample = sample * float(theirs.init_noise_sigma)
    for t, t_ours in zip(theirs.timesteps, ours.timesteps, strict=True):
        scaled = [sample, sample.to(device)]
        if hasattr(theirs, "scale_model_input"):
            scaled = [
                s.scale_model_input(x, at)
                for s, x, at in zip((theirs, ours), scaled, (t, t_ours), strict=True)
            ]
        output = model(scaled[0])
        want = theirs.step(output, t, sample, generator=generators[0], **more)
        got = ours.step(output.to(device), t_ours, sample.to(device), generator=generators[1], **more)
        assert torch.equal(generators[0].get_state(), generators[1].get_state()), "drew differently"
        assert list(got) == list(want)
        for key in want:
            assert got[key].dtype == want[key].dtype or dtype == torch.float64
            # Terms larger than the result: what they round to in float32 is not ours to match.
            largest = want[key].abs().max().clamp(min=1e-3)
            slack = max(1.0, float(sample.abs().max() / largest))
            limit = tolerance * slack + float(blown_up(theirs, t, sample, output) / largest.nan_to_num(1.0))
            assert deviation(got[key].cpu(), want[key]) <= limit, (t, key)
        sample = want.prev_sample


def run(
    cases: list[tuple[str, dict[str, Any]]], check: Callable[..., None], *args: Any, **kwargs: Any
) -> None:
    for name, case in cases:
        try:
            check(name, case, *args, **kwargs)
        except AssertionError as error:
            raise AssertionError(f"{name} {case}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_random_part_of_the_grid(dtype: torch.dtype) -> None:
    # In float64 diffusers still computes in float32 here; in bfloat16 it rounds between operations.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    sampled = [
        (name, case)
        for name in GRIDS
        for case in random.Random(0).sample(GRIDS[name], min(16, len(GRIDS[name])))
    ]
    run(sampled, compare, dtype, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_whole_grid(steps: int) -> None:
    run(CASES, compare, torch.float32, 1e-6, steps=steps)


def test_the_grid_runs_on_the_kernel(target: Target) -> None:
    run(
        random.Random(1).sample(CASES, 3 if INTERPRETING else 20),
        compare,
        torch.float32,
        1e-6,
        3,
        target.device,
    )


def test_lcm_in_float64() -> None:
    for case in GRIDS["LCMScheduler"]:
        compare("LCMScheduler", case, torch.float64, 1e-13, steps=4)


def test_no_case_of_the_grid_uses_the_step_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("super().step was called")

    for name in GRIDS:
        monkeypatch.setattr(getattr(diffusers, name), "step", forbidden)
    for name, case in [*random.Random(2).sample(CASES, 40), ("LCMScheduler", {"thresholding": True})]:
        ours = getattr(diffusion, name)(**case)
        ours.set_timesteps(4)
        sample, output, _ = inputs(torch.float32)
        ours.step(output, ours.timesteps[0], sample)


@pytest.mark.parametrize("churn", [0.5, 40.0])
def test_churn(churn: float) -> None:
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        more = {"s_churn": churn, "s_tmin": 0.2, "s_tmax": 50.0, "s_noise": 1.01}
        compare(
            "EulerDiscreteScheduler",
            {"prediction_type": prediction_type},
            torch.float32,
            2e-6,
            steps=8,
            **more,
        )


def test_per_token_timesteps_are_left_to_diffusers() -> None:
    theirs, ours = pair("FlowMatchEulerDiscreteScheduler")
    sample, output = (torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(at)) for at in range(2))
    times = torch.full((2, 5), 500.0)
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[0]
        results.append(scheduler.step(output, t, sample, per_token_timesteps=times).prev_sample)
    assert torch.equal(*results)


def test_thresholding_of_lcm() -> None:
    for maximum in (1.0, 2.0):
        compare("LCMScheduler", {"thresholding": True, "sample_max_value": maximum}, torch.float32, 1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_step_cfg_is_guidance_then_step(target: Target, name: str) -> None:
    theirs, ours = pair(name)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
    output = inputs(torch.float32, (4, 6, 3, 4))[0]
    sample = inputs(torch.float32, (2, 4, 3, 4))[0]
    uncond, cond = output[:, :4].chunk(2)
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    t = theirs.timesteps[0]
    want = theirs.step(uncond + 3.0 * (cond - uncond), t, sample, generator=generators[0]).prev_sample
    got = ours.step_cfg(
        output.to(target.device),
        t,
        sample.to(target.device),
        3.0,
        order="uncond_cond",
        generator=generators[1],
    ).prev_sample
    assert deviation(got.cpu(), want) <= 2e-6
    assert ours.step_index == theirs.step_index == 1


@pytest.mark.parametrize("name", GRIDS)
def test_signature_and_round_trip(name: str, tmp_path: Any) -> None:
    theirs, ours = (getattr(package, name) for package in (diffusers, diffusion))
    assert issubclass(ours, theirs)
    parameters = [inspect.signature(cls.step).parameters for cls in (theirs, ours)]
    assert [p.default for p in parameters[0].values()] == [p.default for p in parameters[1].values()]
    assert list(parameters[0]) == list(parameters[1])
    ours(num_train_timesteps=500).save_pretrained(tmp_path)
    assert ours.from_pretrained(tmp_path).config.num_train_timesteps == 500


@pytest.mark.parametrize("name", list(GRIDS)[:3])
def test_refuses_an_index_for_a_timestep(name: str) -> None:
    ours = getattr(diffusion, name)()
    ours.set_timesteps(4)
    sample, output, _ = inputs(torch.float32)
    for index in (0, torch.tensor(1)):
        with pytest.raises(ValueError, match=r"timestep: must be one of scheduler\.timesteps"):
            ours.step(output, index, sample)
    with pytest.raises(ValueError, match="has 6 channels"):
        ours.step(torch.cat([output, output], 1), ours.timesteps[0], sample)


def test_refuses_unknown_predictions() -> None:
    sample, output, _ = inputs(torch.float32)
    for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"):
        ours = getattr(diffusion, name)(prediction_type="score")
        ours.set_timesteps(4)
        with pytest.raises(ValueError, match="prediction_type"):
            ours.step(output, ours.timesteps[0], sample)
    with pytest.raises(ValueError, match="set_timesteps"):
        diffusion.LCMScheduler().step(output, 999, sample)
    thresholded = diffusion.LCMScheduler(thresholding=True, sample_max_value=2.0)
    thresholded.set_timesteps(4)
    with pytest.raises(ValueError, match="seed"):
        thresholded.step_cfg(torch.cat([output, output]), thresholded.timesteps[0], sample, 2.0, seed=1)


def test_a_fresh_schedule_is_seen() -> None:
    theirs, ours = pair("EulerDiscreteScheduler")
    sample, output, _ = inputs(torch.float32)
    for steps in (4, 7):
        results = []
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(steps)
            scheduler.scale_model_input(sample, scheduler.timesteps[0])
            results.append(scheduler.step(output, scheduler.timesteps[0], sample).prev_sample)
        assert deviation(results[1], results[0]) <= 1e-6


def test_the_predicted_x0_can_be_left_out() -> None:
    for name in list(GRIDS)[:2]:
        ours = getattr(diffusion, name)()
        ours.keep_pred_original = False
        ours.set_timesteps(4)
        sample, output, _ = inputs(torch.float32)
        assert ours.step(output, ours.timesteps[0], sample).pred_original_sample is None
