"""DDIMScheduler against diffusers' own, over the whole grid of its options."""

from __future__ import annotations

import copy
import inspect
import itertools
import random
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from kdfast.diffusion import DDIMScheduler  # noqa: E402
from tests.conftest import INTERPRETING, Target  # noqa: E402

#: Every option that changes a step: 3,888 combinations, each at its first, middle and last timestep.
GRID = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "clip_sample": [True, False],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "rescale_betas_zero_snr": [True, False],
    "set_alpha_to_one": [True, False],
    "num_inference_steps": [5, 10, 50],
    "eta": [0.0, 0.5, 1.0],
    "use_clipped_model_output": [True, False],
}
CASES = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]


def pair(**config: Any) -> tuple[Any, Any]:
    return diffusers.DDIMScheduler(**config), DDIMScheduler(**config)


def inputs(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (2, 3, 4, 4)) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(7)
    # 3·randn, so that clipping has something to clip.
    return [(scale * torch.randn(shape, generator=made, dtype=torch.float64)).to(dtype) for scale in (3.0, 1.0, 1.0)]


def deviation(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the finite values, relative to the largest of them."""
    finite = want.isfinite()
    if not finite.any():
        return 0.0
    return float((got - want)[finite].abs().max() / want[finite].abs().max().clamp(min=1e-3))


def check(case: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    case = dict(case)
    steps, eta, use_clipped = (case.pop(k) for k in ("num_inference_steps", "eta", "use_clipped_model_output"))
    theirs, ours = pair(**case)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    sample, output, noise = inputs(dtype)
    for t in (theirs.timesteps[0], theirs.timesteps[steps // 2], theirs.timesteps[-1]):
        arguments = (output, t, sample, eta, use_clipped)
        want = theirs.step(*arguments, variance_noise=noise if eta else None)
        got = ours.step(*arguments, variance_noise=noise if eta else None)
        assert got.prev_sample.dtype == dtype
        # Infinite x₀ (zero terminal SNR, ε, no clip) stays infinite in the result, huge in x₀ itself; and where
        # rounding makes diffusers take the root of a negative number (η = 1), we give the number it missed.
        infinite = want.prev_sample.isinf()
        assert torch.equal(got.prev_sample[infinite], want.prev_sample[infinite])
        if want.prev_sample.isnan().any() and eta == 1:
            assert got.prev_sample.isfinite().all() or not want.pred_original_sample.isfinite().all()
        assert deviation(got.prev_sample, want.prev_sample) <= tolerance, (t, "prev_sample")
        assert deviation(got.pred_original_sample, want.pred_original_sample) <= tolerance, (t, "pred_original_sample")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_random_part_of_the_grid(dtype: torch.dtype, tolerance: float) -> None:
    for case in random.Random(0).sample(CASES, 150):
        try:
            check(case, dtype, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("schedule", GRID["beta_schedule"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_whole_grid(dtype: torch.dtype, tolerance: float, schedule: str) -> None:
    for case in CASES:
        if case["beta_schedule"] == schedule:
            try:
                check(case, dtype, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error
