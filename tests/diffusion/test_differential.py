"""Ours beside diffusers' own, of the version that is installed, in random settings: what a user can see is equal."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from kdfast import diffusion as ours  # noqa: E402

#: Cases a scheduler; there are seven.
CASES = 290
#: What ours refuses and theirs goes wrong at, silently.
REFUSED = ("'trailing', which ends at a timestep", "of the schedule", "step ")
BETAS: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 1000, 200, 50],
    "beta_start": [1e-4, 8.5e-4],
    "beta_end": [0.02, 0.012],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, False, False, True],
}
CLIPPED: dict[str, list[Any]] = {
    "clip_sample": [True, False],
    "clip_sample_range": [1.0, 0.5],
    "thresholding": [False, False, True],
    "dynamic_thresholding_ratio": [0.995, 0.8],
    "sample_max_value": [1.0, 1.5],
}
SETTINGS: dict[str, dict[str, list[Any]]] = {
    "DDIMScheduler": {**BETAS, **CLIPPED, "set_alpha_to_one": [True, False]},
    "DDPMScheduler": {
        **BETAS,
        **CLIPPED,
        "variance_type": [
            "fixed_small",
            "fixed_small_log",
            "fixed_large",  # not fixed_large_log: theirs takes the root of a logarithm, which is NaN
            "learned",
            "learned_range",
        ],
    },
    "DPMSolverMultistepScheduler": {
        **BETAS,
        "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
        "solver_order": [1, 2, 3],
        "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"],
        "solver_type": ["midpoint", "heun"],
        "lower_order_final": [True, False],
        "euler_at_final": [False, True],
        "final_sigmas_type": ["zero", "sigma_min"],
        "thresholding": [False, False, True],
        "use_karras_sigmas": [False, False, True],
        "use_exponential_sigmas": [False, False, True],
        "use_lu_lambdas": [False, False, True],
        "use_flow_sigmas": [False, False, False, True],
        "flow_shift": [1.0, 3.0],
        "lambda_min_clipped": [-float("inf"), -5.1],
    },
    "EulerDiscreteScheduler": {
        **BETAS,
        "interpolation_type": ["linear", "log_linear"],
        "use_karras_sigmas": [False, False, True],
        "use_exponential_sigmas": [False, False, True],
        "timestep_type": ["discrete", "continuous"],
        "final_sigmas_type": ["zero", "sigma_min"],
    },
    # Not squaredcos_cap_v2: theirs takes roots of what float32 rounds below 0 there, which is NaN.
    "EulerAncestralDiscreteScheduler": {**BETAS, "beta_schedule": ["linear", "scaled_linear"]},
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": [1000, 100],
        "shift": [1.0, 3.0],
        "use_dynamic_shifting": [False, True],
        "time_shift_type": ["exponential", "linear"],
        "shift_terminal": [None, 0.02],
        "invert_sigmas": [False, False, True],
        "use_karras_sigmas": [False, False, True],
        "use_exponential_sigmas": [False, False, True],
        "stochastic_sampling": [False, True],
    },
    "LCMScheduler": {
        **BETAS,
        "prediction_type": ["epsilon", "sample", "v_prediction"],
        **CLIPPED,
        "set_alpha_to_one": [True, False],
        "timestep_scaling": [10.0, 3.0],
        "original_inference_steps": [50, 20],
    },
}


class Case:
    """One random setting, and what is done with it."""

    def __init__(self, name: str, seed: int) -> None:
        rng = random.Random(f"{name}-{seed}")
        self.name = name
        # Few differ from the defaults at a time, or most settings would be refused.
        known = SETTINGS[name]
        chosen = rng.sample(sorted(known), rng.randint(0, min(6, len(known))))
        self.settings = {key: rng.choice(known[key]) for key in chosen}
        self.steps = rng.choice([1, 2, 3, 4, 7, 10, 20])
        self.shape = (rng.choice([1, 3]), rng.choice([1, 3, 4]), 4, rng.choice([4, 6]))
        self.dtype = rng.choice([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16])
        self.begin = rng.choice([0, 0, 0, rng.randrange(self.steps)])
        self.seed = rng.randrange(1 << 30)
        self.frequency = rng.uniform(0.5, 2.0)
        self.as_tuple = rng.random() < 0.3
        self.options: dict[str, Any] = {}
        if name == "DDIMScheduler":
            self.options = {
                "eta": rng.choice([0.0, 0.5, 1.0]),
                "use_clipped_model_output": rng.random() < 0.3,
            }
        if name == "EulerDiscreteScheduler" and rng.random() < 0.3:
            self.options = {"s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 20.0, "s_noise": 1.01}
        self.noisy = rng.random() < 0.9
        if name == "FlowMatchEulerDiscreteScheduler":
            self.setting = {"mu": 0.7} if self.settings.get("use_dynamic_shifting") else {}
        else:
            self.setting = {}

    def __repr__(self) -> str:
        return f"{self.name}({self.settings}), {self.steps} steps from {self.begin}, {self.dtype}, {self.options}"

    def run(self, library: Any, follow: dict[str, Tensor] | None = None) -> list[tuple[str, Any]]:
        """Everything that is seen on the way, the error at the end included.

        Args:
            library: Whose scheduler.
            follow: Samples of another run by step, to go on from instead of one's own: what is compared then is each
                step by itself, and not what chaos makes of the last bits of half precision.
        """
        seen: list[tuple[str, Any]] = []
        try:
            made = getattr(library, self.name)(**self.settings)
            seen.append(("config", {k: v for k, v in made.config.items() if not k.startswith("_")}))
            made.set_timesteps(self.steps, **self.setting)
            seen.append(("timesteps", made.timesteps))
            if hasattr(made, "init_noise_sigma"):
                seen.append(("init_noise_sigma", torch.as_tensor(made.init_noise_sigma)))
            generator = torch.Generator().manual_seed(self.seed)
            sample = torch.randn(self.shape, generator=generator, dtype=torch.float64).to(self.dtype)
            if self.begin and hasattr(made, "set_begin_index"):
                made.set_begin_index(self.begin)
            if hasattr(made, "add_noise"):
                noised = made.add_noise(
                    sample, torch.ones_like(sample), made.timesteps[self.begin : self.begin + 1]
                )
                seen.append(("add_noise", noised))
            learned = str(self.settings.get("variance_type", "")).startswith("learned")
            for t in made.timesteps[self.begin :]:
                scaled = made.scale_model_input(sample, t) if hasattr(made, "scale_model_input") else sample
                output = torch.sin(self.frequency * scaled)
                if learned:
                    output = torch.cat((output, 0.5 * torch.cos(scaled)), 1)
                options = {**self.options, **({"generator": generator} if self.noisy_step() else {})}
                result = made.step(output, t, sample, return_dict=not self.as_tuple, **options)
                sample = result[0] if self.as_tuple else result.prev_sample
                seen.append((f"step {t}", sample))
                sample = (follow or {}).get(f"step {t}", sample)
                more = result[1:] if self.as_tuple else [v for k, v in result.items() if k != "prev_sample"]
                seen.extend((f"beside step {t}", value) for value in more if isinstance(value, Tensor))
            seen.append(("generator", generator.get_state()))
        except Exception as error:
            seen.append(("error", error))
        return seen

    def noisy_step(self) -> bool:
        """Whether steps are given the generator: the global one is seeded alike, too."""
        return self.noisy


def compare(case: Case) -> str | None:
    """What differs, in words, or None; how the case ended in both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(case.seed)
        theirs = case.run(diffusers)
        torch.manual_seed(case.seed)
        mine = case.run(ours, {what: value for what, value in theirs if what.startswith("step ")})
    before = last = 1.0
    for (what, one), (also, other) in zip(theirs, mine):
        if what == "error" or also == "error":
            if what == also:
                return None
            if also == "error" and any(words in str(other) for words in REFUSED):
                return None
            return f"{what}: {one!r} / {also}: {other!r}"
        if what != also:
            return f"{what} / {also}"
        if what == "config":
            if one != other:
                return f"config {one} / {other}"
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{what}: {one.dtype} {tuple(one.shape)} / {other.dtype} {tuple(other.shape)}"
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return f"{what}: {one} / {other}"
            continue
        if (
            not one.isfinite().all()
        ):  # at zero terminal SNR; and float16 overflows in theirs, where ours is float32
            if other.isfinite().all() and case.dtype != torch.float16:
                return f"{what}: theirs is not finite, ours is"
            return None
        size = float(one.double().abs().max())
        if what.startswith("step "):
            before, last = last, size
        # What comes out of a step is a difference of what went in.
        scale = max(size, before) + 1e-3
        error = float((one.double() - other.double()).abs().max()) / scale
        # Ours rounds half precision once, theirs after each operation.
        allowed = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 0.03}.get(case.dtype, 0.2)
        if not error <= allowed:
            return f"{what}: off by {error:.3g} of {scale:.3g}"
    return None if len(theirs) == len(mine) else f"{len(theirs)} / {len(mine)} things seen"


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_random_settings_give_what_diffusers_gives(name: str) -> None:
    cases = [Case(name, seed) for seed in range(CASES)]
    assert len(SETTINGS) * CASES >= 2000
    wrong = [(case, found) for case in cases if (found := compare(case)) is not None]
    listed = "\n".join(f"{case!r}: {found}" for case, found in wrong[:10])
    assert not wrong, f"{len(wrong)} of {CASES} differ:\n{listed}"


@pytest.mark.slow
def test_most_cases_run_to_their_end() -> None:
    """Or there would be little to compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = [Case(name, seed).run(diffusers)[-1][0] for name in SETTINGS for seed in range(40)]
    assert ends.count("generator") > 0.75 * len(ends)
