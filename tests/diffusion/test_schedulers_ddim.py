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
    return [
        (scale * torch.randn(shape, generator=made, dtype=torch.float64)).to(dtype)
        for scale in (3.0, 1.0, 1.0)
    ]


def deviation(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the finite values, relative to the largest of them."""
    finite = want.isfinite()
    if not finite.any():
        return 0.0
    return float((got - want)[finite].abs().max() / want[finite].abs().max().clamp(min=1e-3))


def check(case: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    case = dict(case)
    steps, eta, use_clipped = (
        case.pop(k) for k in ("num_inference_steps", "eta", "use_clipped_model_output")
    )
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
        # Infinite x₀ (zero terminal SNR, ε, no clip) stays infinite in the result, huge in x₀ itself; where
        # rounding makes diffusers take the root of a negative number (η = 1), we give the number it missed.
        infinite = want.prev_sample.isinf()
        assert torch.equal(got.prev_sample[infinite], want.prev_sample[infinite])
        if want.prev_sample.isnan().any() and eta == 1:
            assert got.prev_sample.isfinite().all() or not want.pred_original_sample.isfinite().all()
        assert deviation(got.prev_sample, want.prev_sample) <= tolerance, (t, "prev_sample")
        # x₀ comes from terms of 1/√ᾱ before it is clipped to 1; both sides round those in float32.
        loose = tolerance * (1 if dtype == torch.float64 else 3)
        assert deviation(got.pred_original_sample, want.pred_original_sample) <= loose, (
            t,
            "pred_original_sample",
        )


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_random_part_of_the_grid(dtype: torch.dtype, tolerance: float) -> None:
    for case in random.Random(0).sample(CASES, 150):
        try:
            check(case, dtype, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("schedule", GRID["beta_schedule"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_whole_grid(dtype: torch.dtype, tolerance: float, schedule: str) -> None:
    for case in CASES:
        if case["beta_schedule"] == schedule:
            try:
                check(case, dtype, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error


def test_the_grid_runs_on_the_kernel(target: Target) -> None:
    for case in random.Random(1).sample(CASES, 6 if INTERPRETING else 20):
        case = {**case, "rescale_betas_zero_snr": False}
        steps, eta, clipped = (
            case.pop(k) for k in ("num_inference_steps", "eta", "use_clipped_model_output")
        )
        theirs, ours = pair(**case)
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps, device=target.device)
        sample, output, noise = inputs(torch.float32)
        moved = [tensor.to(target.device) for tensor in (sample, output, noise)]
        for at in (0, steps // 2, -1):
            want = theirs.step(output, theirs.timesteps[at], sample, eta, clipped, variance_noise=noise)
            got = ours.step(moved[1], ours.timesteps[at], moved[0], eta, clipped, variance_noise=moved[2])
            assert deviation(got.prev_sample.cpu(), want.prev_sample) <= 1e-6, case


def test_no_case_of_the_grid_uses_the_step_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("super().step was called")

    monkeypatch.setattr(diffusers.DDIMScheduler, "step", forbidden)
    sample, output, noise = inputs(torch.float32)
    for case in [*random.Random(2).sample(CASES, 60), {"thresholding": True, **CASES[0]}]:
        case = dict(case)
        steps, eta, clipped = (
            case.pop(k) for k in ("num_inference_steps", "eta", "use_clipped_model_output")
        )
        ours = DDIMScheduler(**case)
        ours.set_timesteps(steps)
        ours.step(output, ours.timesteps[0], sample, eta, clipped, variance_noise=noise)


@pytest.mark.parametrize(
    "prediction_type, total, mean", [("epsilon", 172.0067, 0.223967), ("v_prediction", 52.5302, 0.0684)]
)
def test_the_full_loop_of_diffusers_own_tests(
    target: Target, prediction_type: str, total: float, mean: float
) -> None:
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True,
        prediction_type=prediction_type,
    )  # fmt: skip
    scheduler.set_timesteps(10, device=target.device)
    sample = (torch.arange(768).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2).to(target.device)
    for t in scheduler.timesteps:
        sample = scheduler.step(sample * t / (t + 1), t, sample, 0.0).prev_sample
    assert abs(float(sample.abs().sum()) - total) < 1e-2
    assert abs(float(sample.abs().mean()) - mean) < 1e-3


# --- noise ----------------------------------------------------------------------------------------


def test_a_generator_draws_what_diffusers_draws() -> None:
    theirs, ours = pair()
    sample, output, _ = inputs(torch.float32)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    for make in (
        lambda: torch.Generator().manual_seed(3),
        lambda: [torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ):
        want = theirs.step(output, 500, sample, 1.0, generator=make()).prev_sample
        got = ours.step(output, 500, sample, 1.0, generator=make()).prev_sample
        assert deviation(got, want) <= 1e-6
    torch.manual_seed(5)
    want = theirs.step(output, 500, sample, 0.7).prev_sample
    torch.manual_seed(5)
    assert deviation(ours.step(output, 500, sample, 0.7).prev_sample, want) <= 1e-6


def test_eta_zero_leaves_the_generators_alone() -> None:
    _, ours = pair()
    ours.set_timesteps(10)
    sample, output, noise = inputs(torch.float32)
    made = torch.Generator().manual_seed(0)
    before, default = made.get_state(), torch.get_rng_state()
    ours.step(output, 500, sample, 0.0, generator=made, variance_noise=noise)
    assert torch.equal(before, made.get_state())
    assert torch.equal(default, torch.get_rng_state())


def test_two_sources_of_noise_are_refused() -> None:
    _, ours = pair()
    ours.set_timesteps(10)
    sample, output, noise = inputs(torch.float32)
    with pytest.raises(ValueError, match="generator and variance_noise"):
        ours.step(output, 500, sample, 1.0, generator=torch.Generator(), variance_noise=noise)


# --- guidance -------------------------------------------------------------------------------------


def dit_tail(
    scheduler: Any, output: torch.Tensor, t: Any, sample: torch.Tensor, scale: float, guided: int, **more: Any
):
    """What diffusers' DiTPipeline does after its transformer; ``guided``: how many channels it guides."""
    eps, rest = output[:, :guided], output[:, guided:]
    cond, uncond = eps.chunk(2)
    half = uncond + scale * (cond - uncond)
    eps = torch.cat([torch.cat([half, half]), rest], dim=1)
    return scheduler.step(eps[:, : sample.shape[1]], t, sample, **more).prev_sample


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("cfg_channels", [None, 3])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_step_cfg_is_the_tail_of_the_dit_pipeline(
    target: Target, rows: int, cfg_channels: int | None, eta: float
) -> None:
    theirs, ours = pair(clip_sample=False)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    output, half, noise = (
        inputs(torch.float32, shape)[0] for shape in ((4, 8, 3, 4), (2, 4, 3, 4), (4, 4, 3, 4))
    )
    sample = torch.cat([half, half])
    more = {"variance_noise": noise} if eta else {}
    want = dit_tail(theirs, output, 500, sample, 2.0, cfg_channels or 4, eta=eta, **more)
    arguments = [t.to(target.device) for t in (output, sample[: 2 * rows], noise[: 2 * rows])]
    got = ours.step_cfg(
        arguments[0], 500, arguments[1], 2.0, cfg_channels=cfg_channels, eta=eta,
        variance_noise=arguments[2] if eta else None,
    ).prev_sample  # fmt: skip
    assert got.shape[0] == 2 * rows
    assert deviation(got.cpu(), want[: 2 * rows]) <= 1e-6


def test_step_cfg_with_the_unconditional_half_first() -> None:
    theirs, ours = pair()
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    uncond, cond, sample = inputs(torch.float32)
    want = theirs.step(uncond + 7.5 * (cond - uncond), 500, sample).prev_sample
    got = ours.step_cfg(torch.cat([uncond, cond]), 500, sample, 7.5, order="uncond_cond").prev_sample
    assert deviation(got, want) <= 1e-6


def test_step_cfg_draws_as_diffusers_would() -> None:
    theirs, ours = pair(clip_sample=False)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    output, half = (inputs(torch.float32, shape)[0] for shape in ((4, 8, 3, 4), (2, 4, 3, 4)))
    sample = torch.cat([half, half])
    want = dit_tail(theirs, output, 500, sample, 2.0, 4, eta=1.0, generator=torch.Generator().manual_seed(1))
    got = ours.step_cfg(
        output, 500, sample, 2.0, eta=1.0, generator=torch.Generator().manual_seed(1)
    ).prev_sample
    assert deviation(got, want) <= 1e-6


def test_step_cfg_makes_noise_in_the_kernel(target: Target) -> None:
    _, ours = pair(clip_sample=False)
    ours.set_timesteps(10)
    output, sample = (
        inputs(torch.float32, shape)[0].to(target.device) for shape in ((4, 4, 3, 4), (2, 4, 3, 4))
    )
    plain = ours.step_cfg(
        output, 500, sample, 2.0, eta=1.0, variance_noise=torch.zeros_like(sample)
    ).prev_sample
    noisy = ours.step_cfg(output, 500, sample, 2.0, eta=1.0, seed=3).prev_sample
    again = ours.step_cfg(
        output, 500, sample, 2.0, eta=1.0, seed=torch.tensor(3, device=target.device)
    ).prev_sample
    assert torch.equal(noisy, again)
    assert 0.1 < float((noisy - plain).std()) < 1.0


def test_the_predicted_x0_can_be_left_out() -> None:
    _, ours = pair()
    ours.set_timesteps(10)
    sample, output, _ = inputs(torch.float32)
    want = ours.step(output, 500, sample)
    ours.keep_pred_original = False
    got = ours.step(output, 500, sample)
    assert got.pred_original_sample is None
    assert torch.equal(got.prev_sample, want.prev_sample)


# --- a drop-in ------------------------------------------------------------------------------------


def test_it_is_a_ddim_scheduler_with_the_same_signature() -> None:
    assert issubclass(DDIMScheduler, diffusers.DDIMScheduler)
    ours, theirs = (
        inspect.signature(cls.step).parameters for cls in (DDIMScheduler, diffusers.DDIMScheduler)
    )
    assert list(ours) == list(theirs)
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}


def test_save_and_load_in_both_directions(tmp_path: Any) -> None:
    ours = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction")
    ours.save_pretrained(tmp_path / "ours")
    again = DDIMScheduler.from_pretrained(tmp_path / "ours")
    assert type(again) is DDIMScheduler
    public = {key: value for key, value in ours.config.items() if not key.startswith("_")}
    assert {key: again.config[key] for key in public} == public
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path / "ours")
    assert theirs.config.prediction_type == "v_prediction"
    theirs.save_pretrained(tmp_path / "theirs")
    assert DDIMScheduler.from_pretrained(tmp_path / "theirs").config.beta_schedule == "scaled_linear"
    other = diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    assert DDIMScheduler.from_config(other.config).config.beta_schedule == "scaled_linear"


def test_a_changed_config_or_schedule_is_seen() -> None:
    """Pipelines replace the config after construction, and users the schedule."""
    theirs, ours = pair()
    sample, output, _ = inputs()
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        scheduler.step(output, 500, sample)
        scheduler.register_to_config(prediction_type="v_prediction", clip_sample=False)
    assert deviation(ours.step(output, 500, sample)[0], theirs.step(output, 500, sample)[0]) <= 1e-13
    for scheduler in (theirs, ours):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    assert deviation(ours.step(output, 500, sample)[0], theirs.step(output, 500, sample)[0]) <= 1e-13
    for scheduler in (theirs, ours):
        scheduler.alphas_cumprod.mul_(0.9)
    assert deviation(ours.step(output, 500, sample)[0], theirs.step(output, 500, sample)[0]) <= 1e-13
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(20)
    assert deviation(ours.step(output, 500, sample)[0], theirs.step(output, 500, sample)[0]) <= 1e-13


def test_inference_mode_and_then_training() -> None:
    sample, output, _ = inputs(torch.float32)
    with torch.inference_mode():
        ours = DDIMScheduler()
        ours.set_timesteps(10)
        want = ours.step(output, 500, sample).prev_sample
    leaf = sample.clone().requires_grad_()
    got = ours.step(output, 500, leaf).prev_sample
    got.sum().backward()
    assert torch.equal(got.detach(), want)


def test_a_slice_of_the_timesteps_finds_its_rows() -> None:
    theirs, ours = pair()
    sample, output, _ = inputs()
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        scheduler.timesteps = scheduler.timesteps[4:]
    for t in ours.timesteps:
        assert deviation(ours.step(output, t, sample)[0], theirs.step(output, t, sample)[0]) <= 1e-13


def test_return_dict_and_copies() -> None:
    theirs, ours = pair()
    sample, output, _ = inputs()
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    as_tuple = ours.step(output, 500, sample, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], ours.step(output, 500, sample).prev_sample)
    assert isinstance(ours.step(output, 500, sample), type(theirs.step(output, 500, sample)))
    twin = copy.deepcopy(ours)
    assert torch.equal(twin.step(output, 500, sample)[0], as_tuple[0])


@pytest.mark.parametrize("sample_max_value", [1.0, 2.0])
def test_thresholding(sample_max_value: float) -> None:
    theirs, ours = pair(thresholding=True, sample_max_value=sample_max_value, clip_sample=False)
    sample, output, _ = inputs()
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    assert deviation(ours.step(output, 700, sample)[0], theirs.step(output, 700, sample)[0]) <= 1e-13
    doubled = torch.cat([output, 0.5 * output])
    want = theirs.step(1.5 * output - 0.5 * 0.5 * output - 0.0 * output, 700, sample)[0]
    got = ours.step_cfg(doubled, 700, sample, 1.5)[0]
    assert deviation(got, want) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_add_noise_and_velocity(dtype: torch.dtype) -> None:
    theirs, ours = pair()
    sample, noise, _ = inputs(dtype)
    timesteps = torch.tensor([0, 999])
    schedule = ours.alphas_cumprod
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for name in ("add_noise", "get_velocity"):
        got, want = (getattr(scheduler, name)(sample, noise, timesteps) for scheduler in (ours, theirs))
        assert got.dtype == want.dtype
        assert deviation(got.double(), want.double()) <= tolerance
    assert ours.alphas_cumprod is schedule
    if dtype == torch.bfloat16:
        # ᾱ₀ = 0.9999 is 1 in bfloat16; the noise at t = 0 must not vanish for that.
        zero = torch.zeros_like(sample)
        factor = ours.add_noise(zero, torch.ones_like(noise), timesteps)[0].mean()
        assert abs(float(factor) - 0.01) < 1e-3


def test_a_perfect_noise_oracle_recovers_x0(target: Target) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    clean, noise, _ = (tensor.to(target.device) for tensor in inputs(torch.float32))
    scheduler.set_timesteps(10, device=target.device)
    t = scheduler.timesteps[0]
    sample = scheduler.add_noise(clean, noise, t.reshape(1))
    for t in scheduler.timesteps:
        sample = scheduler.step(noise, t, sample).prev_sample
    torch.testing.assert_close(sample, clean, rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_is_exact_where_it_is_clipped() -> None:
    theirs, ours = pair(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    sample, output, _ = inputs(torch.float32)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
    assert float(ours.alphas_cumprod[999]) == 0.0
    want, got = (scheduler.step(output, 999, sample) for scheduler in (theirs, ours))
    assert got.prev_sample.isfinite().all()
    assert torch.equal(got.pred_original_sample, want.pred_original_sample)


def test_gradients_flow_through_a_sampling_loop(target: Target) -> None:
    """Denoising student features (DiffKD) differentiates through every step."""

    def loop(scheduler: Any, sample: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        for t in scheduler.timesteps:
            sample = scheduler.step(torch.tanh(weight * sample), t, sample).prev_sample
        return sample.square().sum()

    grads = []
    for scheduler, device in zip(pair(clip_sample=True), ("cpu", target.device), strict=True):
        scheduler.set_timesteps(5)
        sample, weight = (
            t.to(device).requires_grad_() for t in (inputs(torch.float32)[0], torch.tensor(0.3))
        )
        grads.append(
            [g.cpu() for g in torch.autograd.grad(loop(scheduler, sample, weight), (sample, weight))]
        )
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------


def test_refusals() -> None:
    ours = DDIMScheduler()
    sample, output, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.step(output, 500, sample)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match="cannot be larger"):
        DDIMScheduler().set_timesteps(1001)
    with pytest.raises(TypeError, match="timestep: must be an integer, got float"):
        ours.step(output, 500.0, sample)
    with pytest.raises(TypeError, match="timestep"):
        ours.step(output, torch.tensor(500.0), sample)
    with pytest.raises(ValueError, match="one element"):
        ours.step(output, torch.tensor([1, 2]), sample)
    with pytest.raises(ValueError, match=r"step: must be in \[0, 1000\)"):
        ours.step(output, 1000, sample)
    with pytest.raises(ValueError, match="has 6 channels for a sample of 3"):
        ours.step(torch.cat([output, output], 1), 500, sample)
    with pytest.raises(ValueError, match="order"):
        ours.step_cfg(torch.cat([output, output]), 500, sample, 2.0, order="cond_first")
    with pytest.raises(ValueError, match="two rows"):
        ours.step_cfg(torch.cat([output] * 3), 500, sample, 2.0)
    other = DDIMScheduler(prediction_type="score")
    other.set_timesteps(10)
    with pytest.raises(ValueError, match="prediction_type"):
        other.step(output, 500, sample)
    thresholded = DDIMScheduler(thresholding=True, sample_max_value=2.0)
    thresholded.set_timesteps(10)
    with pytest.raises(ValueError, match="seed"):
        thresholded.step_cfg(torch.cat([output, output]), 500, sample, 2.0, eta=1.0, seed=1)


def test_importing_kdfast_imports_no_diffusers() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['diffusers'] = None; import kdfast.diffusion; dir(kdfast.diffusion)\n"
        "try: kdfast.diffusion.DDIMScheduler\n"
        "except kdfast.MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "kdfast[diffusion]"' in done.stdout
