"""DPMSolverMultistepScheduler against diffusers' own, over whole loops."""

from __future__ import annotations

import inspect
import itertools
import random
import warnings
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from kdfast.diffusion import DPMSolverMultistepScheduler  # noqa: E402
from kdfast.ops.denoise import COLUMNS  # noqa: E402
from tests.conftest import INTERPRETING, Target  # noqa: E402
from tests.diffusion.test_schedulers_ddim import deviation, inputs  # noqa: E402

GRID = {
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"],
    "solver_order": [1, 2, 3],
    "solver_type": ["midpoint", "heun"],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "beta_schedule": ["linear", "squaredcos_cap_v2"],
    "use_karras_sigmas": [False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "lower_order_final": [True, False],
    "timestep_spacing": ["linspace", "trailing"],
}


def possible(case: dict[str, Any]) -> bool:
    noise = not case["algorithm_type"].endswith("++")
    no_third = case["algorithm_type"] == "sde-dpmsolver" and case["solver_order"] == 3
    # A karras schedule ends at a σ of its own, below which sigma_min of the schedule may lie above.
    return not (noise and case["final_sigmas_type"] == "zero") and not no_third


CASES = [
    case
    for values in itertools.product(*GRID.values())
    if possible(case := dict(zip(GRID, values, strict=True)))
]


def pair(**config: Any) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the two algorithms in ε are deprecated
        return diffusers.DPMSolverMultistepScheduler(**config), DPMSolverMultistepScheduler(**config)


def compare(
    case: dict[str, Any], dtype: torch.dtype, tolerance: float, steps: int = 6, device: str = "cpu"
) -> None:
    theirs, ours = pair(**case)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps, device=device)
    for scheduler in (theirs, ours):
        scheduler.set_begin_index(0)  # Karras schedules repeat timesteps, and a search would find the second
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    sample = inputs(dtype)[0]
    for t, t_ours in zip(theirs.timesteps, ours.timesteps, strict=True):
        output = torch.sin(3 * sample)
        at = ours.step_index or 0
        ours._step_index = at
        order = ours._order()
        want = theirs.step(output, t, sample, generator=generators[0]).prev_sample
        got = ours.step(output.to(device), t_ours, sample.to(device), generator=generators[1]).prev_sample
        assert torch.equal(generators[0].get_state(), generators[1].get_state()), "drew differently"
        assert got.dtype == want.dtype
        if not want.isfinite().all():
            break  # a step of h = 0 or of σ' > σ: not a number in diffusers
        # The algorithms in ε, and third order, subtract terms that may be thousands of times the result; they
        # are rounded in float32 (by diffusers also in float64 and bfloat16), and that is the bound.
        row = ours._table(torch.device("cpu"), torch.float64)[(order - 1) * steps + at]
        factors = [row[COLUMNS.index(name)].abs() for name in ("a", "b", "d1", "d2")]
        operands = [sample, *(m for m in reversed(theirs.model_outputs) if m is not None)]
        terms = sum(float(f * x.abs().max()) for f, x in zip(factors, operands, strict=False))
        error = float((got.cpu().double() - want.double()).abs().max())
        assert error <= tolerance * max(terms, float(want.abs().max())), t
        sample = want


def run(cases: list[dict[str, Any]], *args: Any, **kwargs: Any) -> None:
    for case in cases:
        try:
            compare(case, *args, **kwargs)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_random_part_of_the_grid(dtype: torch.dtype) -> None:
    # In float64 diffusers still computes in float32 here; in bfloat16 it rounds the prediction first.
    run(random.Random(0).sample(CASES, 60), dtype, 2e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 6, 20])
def test_whole_grid(steps: int) -> None:
    run(CASES, torch.float32, 1e-6, steps=steps)


def test_the_grid_runs_on_the_kernel(target: Target) -> None:
    run(random.Random(1).sample(CASES, 3 if INTERPRETING else 20), torch.float32, 1e-6, 4, target.device)


def test_no_case_of_the_grid_uses_the_step_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("diffusers' step was called")

    cls = diffusers.DPMSolverMultistepScheduler
    for name in ("step", "convert_model_output", "dpm_solver_first_order_update"):
        monkeypatch.setattr(cls, name, forbidden)
    for case in [*random.Random(2).sample(CASES, 40), {"thresholding": True}]:
        ours = pair(**case)[1]
        ours.set_timesteps(4)
        ours.set_begin_index(0)
        sample, output, _ = inputs(torch.float32)
        for t in ours.timesteps:
            sample = ours.step(output, t, sample).prev_sample


def test_flow_matching() -> None:
    case = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    for order in (1, 2, 3):
        for steps in (4, 20):
            compare({**case, "solver_order": order}, torch.float32, 1e-6, steps=steps)


def test_thresholding() -> None:
    for algorithm in ("dpmsolver++", "sde-dpmsolver"):
        for maximum in (1.0, 2.0):
            case = {"algorithm_type": algorithm, "thresholding": True, "sample_max_value": maximum}
            compare({**case, "final_sigmas_type": "sigma_min"}, torch.float32, 2e-6)


def test_given_noise() -> None:
    theirs, ours = pair(algorithm_type="sde-dpmsolver++")
    sample, output, noise = inputs(torch.float32)
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(6)
        results.append(
            scheduler.step(output, scheduler.timesteps[0], sample, variance_noise=noise).prev_sample
        )
    assert deviation(results[1], results[0]) <= 1e-6


def test_step_cfg_keeps_the_history_of_the_guided_prediction(target: Target) -> None:
    theirs, ours = pair()
    output = inputs(torch.float32, (4, 6, 3, 4))[0]
    samples = [inputs(torch.float32, (2, 4, 3, 4))[0]] * 2
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
    samples[1] = samples[1].to(target.device)
    for t in theirs.timesteps:
        uncond, cond = output[:, :4].chunk(2)
        samples[0] = theirs.step(uncond + 3.0 * (cond - uncond), t, samples[0]).prev_sample
        samples[1] = ours.step_cfg(
            output.to(target.device), t, samples[1], 3.0, order="uncond_cond"
        ).prev_sample
        output = -0.5 * output
    assert deviation(samples[1].cpu(), samples[0]) <= 1e-5


def test_gradients_reach_every_step() -> None:
    grads = []
    for scheduler in pair():
        scheduler.set_timesteps(4)
        sample = inputs(torch.float32)[0].requires_grad_()
        current = sample
        for t in scheduler.timesteps:
            current = scheduler.step(torch.sin(current), t, current).prev_sample
        grads.append(torch.autograd.grad(current.square().sum(), sample)[0])
    assert deviation(grads[1], grads[0]) <= 1e-4


def test_a_learned_variance_is_not_read() -> None:
    theirs, ours = pair(variance_type="learned_range")
    sample, output, more = inputs(torch.float32)
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
        results.append(
            scheduler.step(torch.cat([output, more], 1), scheduler.timesteps[0], sample).prev_sample
        )
    assert deviation(results[1], results[0]) <= 1e-6


def test_signature_and_round_trip(tmp_path: Any) -> None:
    theirs, ours = diffusers.DPMSolverMultistepScheduler, DPMSolverMultistepScheduler
    parameters = [inspect.signature(cls.step).parameters for cls in (theirs, ours)]
    assert list(parameters[0]) == list(parameters[1])
    assert [p.default for p in parameters[0].values()] == [p.default for p in parameters[1].values()]
    ours(solver_order=3).save_pretrained(tmp_path)
    assert ours.from_pretrained(tmp_path).config.solver_order == 3


def test_refusals() -> None:
    sample, output, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match="set_timesteps"):
        DPMSolverMultistepScheduler().step(output, 999, sample)
    for config, message in (
        ({"solver_order": 4}, "solver_order: must be 1, 2 or 3, got 4"),
        ({"prediction_type": "score"}, "prediction_type: dpmsolver"),
        (
            {"algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
            "no third order",
        ),
    ):
        ours = pair(**config)[1]
        ours.set_timesteps(4)
        with pytest.raises(ValueError, match=message):
            ours.step(output, ours.timesteps[0], sample)
    ours = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    ours.set_timesteps(4)
    with pytest.raises(ValueError, match="has 6 channels"):
        ours.step(torch.cat([output, output], 1), ours.timesteps[0], sample)
    with pytest.raises(ValueError, match="one source of noise"):
        ours.step_cfg(
            torch.cat([output, output]), ours.timesteps[0], sample, 2.0, variance_noise=sample, seed=1
        )
