"""Odd arguments, one at a time, for every function of ``kdfast.functional``: taken, or refused by name."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import kdfast.functional as F
from kdfast.data.surrogate.programs import table
from kdfast.data.surrogate.shaders import random_programs


def logits(rows: int = 4, classes: int = 5) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))


def calls() -> dict[str, dict[str, Any]]:
    """For every function, arguments that it takes, every one of them given."""
    pair: dict[str, Any] = {"student": logits(), "teacher": logits().flip(0), "temperature": 2.0, "dim": -1}
    weighted = {
        "reduction": "batchmean",
        "row_weight": torch.ones(4),
        "mask": torch.ones(4, dtype=torch.bool),
    }
    target = torch.tensor([0, 1, 2, 3])
    images = torch.rand(4, 3, 8, 8)
    norm: dict[str, Any] = {
        "x": torch.randn(4, 3, 2, 2),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }
    programs = table(random_programs(2, seed=0))
    made = {
        "kd_kl_div": pair | weighted | {"divisor": 3.0},
        "kd_statistics": pair,
        "distillation_loss": pair
        | weighted
        | {
            "target": target,
            "kd_weight": 1.0,
            "ce_weight": 0.5,
            "label_smoothing": 0.1,
            "mixed_target": target.flip(0),
            "lam": 0.5,
            "ignore_index": -100,
        },
        "jsd_loss": pair | weighted | {"beta": 0.5},
        "divergence_loss": pair
        | weighted
        | {"kind": "skew_reverse_kl", "teacher_temperature": 3.0, "beta": 0.5, "alpha": 0.1},
        "dkd_loss": pair | weighted | {"target": target, "alpha": 1.0, "beta": 2.0, "ignore_index": -100},
        "dist_loss": pair | {"beta": 1.0, "gamma": 1.0},
        "topk_kd_loss": weighted
        | {
            "student": logits(),
            "indices": target[:, None] + torch.arange(2),
            "logits": logits(4, 2),
            "temperature": 2.0,
            "tail": "bucket",
            "log_normalizer": torch.full((4,), 3.0),
        },
        "fused_linear_kd_loss": weighted
        | {
            "student_hidden": logits(4, 3),
            "student_weight": logits(5, 3),
            "teacher_hidden": logits(4, 6),
            "teacher_weight": logits(5, 6),
            "temperature": 2.0,
            "student_bias": torch.zeros(5),
            "teacher_bias": torch.zeros(5),
            "chunk_rows": 2,
            "kind": "jsd",
            "teacher_temperature": 3.0,
            "beta": 0.5,
            "target": target,
            "kd_weight": 1.0,
            "ce_weight": 0.5,
            "ignore_index": -100,
            "label_smoothing": 0.1,
            "softcap": 30.0,
            "teacher_softcap": 20.0,
        },
        "denoise_step": {
            "sample": torch.randn(2, 3, 4),
            "model_output": torch.randn(4, 3, 4),
            "coefficients": torch.rand(5, 10),
            "step": 2,
            "guidance_scale": 2.0,
            "noise": torch.randn(2, 3, 4),
            "seed": None,
            "order": "cond_uncond",
            "cfg_channels": 2,
            "clip": 1.0,
            "history": (torch.randn(2, 3, 4),),
        },
        "noise_mix": {"x": torch.randn(4, 3), "gamma": torch.full((4,), 0.5), "seed": 1},
        "noise_mse": {"prediction": torch.randn(4, 3), "seed": 1},
        "add_noise_embed": {
            "latent": torch.randn(2, 3, 4, 4),
            "timesteps": torch.tensor([1, 2]),
            "alphas_cumprod": torch.linspace(0.99, 0.1, 10),
            "embedding": torch.randn(10, 3),
            "seed": 1,
        },
        "reparam_middle_loss": {
            "branches": torch.randn(2, 3, 4),
            "target": torch.randn(3, 4),
            "u": torch.rand(2),
            "v": torch.rand(2),
            "permutation": torch.tensor([0, 1]),
            "noise_scale": torch.rand(2),
            "seed": 1,
            "carry_gradient": True,
            "mean_needs_grad": True,
        },
        "bn_relu": norm | {"residual": torch.randn(4, 3, 2, 2), "relu": True},
        "bn_ddim_step": norm | {"sample": torch.randn(4, 3, 2, 2), "c1": 1.0, "c2": 0.5},
        "bn_mse": norm | {"target": torch.randn(4, 3, 2, 2)},
        "bn_statistics_loss": {
            "x": torch.randn(4, 3, 2, 2),
            "running_mean": torch.zeros(3),
            "running_var": torch.ones(3),
            "average_mean": torch.zeros(3),
            "average_var": torch.ones(3),
            "average_share": 0.9,
            "squared": False,
        },
        "crop_flip_normalize": {
            "images": images,
            "offsets": torch.ones(4, 2, dtype=torch.int32),
            "flips": torch.tensor([True, False, True, False]),
            "mean": 0.5,
            "std": (0.5, 0.5, 0.5),
            "padding": 1,
            "size": 8,
            "dtype": torch.float32,
            "channels_last": False,
        },
        "draw_crop_flip": {"images": images, "padding": 1, "size": (8, 8), "flip": 0.5, "generator": None},
        "render_leaves": {"index": torch.arange(2), "shape": (4, 4), "seed": 1, "limit": 20},
        "render_shaders": {
            "codes": programs.codes,
            "values": programs.values,
            "rates": programs.rates,
            "program": torch.tensor([1]),
            "time": torch.rand(1),
            "shape": (4, 4),
            "antialias": 1,
            "dtype": torch.uint8,
        },
    }
    for name, given in made.items():
        known = set(inspect.signature(getattr(F, name)).parameters)
        assert set(given) <= known, (name, set(given) - known)
    return made


CALLS = calls()


def odd(value: Any, rng: np.random.Generator) -> Any:
    """Something else in the place of a value that is taken."""
    plain: list[Callable[[], Any]] = [
        lambda: None,
        lambda: ["x", "", b"x", "mean", "nan"][int(rng.integers(5))],
        lambda: [[], (), {}, object(), set(), [1, "x"], [None], range(3)][int(rng.integers(8))],
        lambda: bool(rng.integers(2)),
        lambda: int(rng.choice([-(2**62), -2, -1, 0, 1, 2, 3, 7, 2**31, 2**62])),
        lambda: [2**63, 2**64, -(2**70), 10**400][int(rng.integers(4))],
        lambda: float(rng.choice([math.nan, math.inf, -math.inf, -1.0, 0.0, 0.5, 1e-320, 1e308, -1e308])),
        lambda: [torch.float32, torch.int32, "cpu", torch.device("cpu"), 1j, np.float32(1), np.ones(2)][
            int(rng.integers(7))
        ],
        lambda: torch.full((), float(rng.choice([math.nan, math.inf, -1.0, 0.5, 1e38]))),
        lambda: tuple(rng.integers(-2, 9, int(rng.integers(4))).tolist()),
    ]
    if not isinstance(value, torch.Tensor):
        return plain[int(rng.integers(len(plain)))]()
    tensors: list[Callable[[torch.Tensor], Any]] = [
        lambda t: t.to(
            [
                torch.int64,
                torch.int32,
                torch.bool,
                torch.complex64,
                torch.float16,
                torch.float64,
                torch.uint8,
            ][int(rng.integers(7))]
        ),
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: t.unsqueeze(0),
        lambda t: t.flatten(),
        lambda t: t.reshape(-1)[:1],
        lambda t: t.reshape(-1)[:0],
        lambda t: t[..., :-1] if t.dim() else t,
        lambda t: torch.cat([t, t]) if t.dim() else t,
        lambda t: t.mT if t.dim() > 1 else t,
        lambda t: t.expand(2, *t.shape),
        lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
        lambda t: torch.full_like(
            t, -1 if not t.is_floating_point() else float(rng.choice([math.nan, math.inf]))
        ),
        lambda t: torch.full_like(t, 2**31 - 1) if t.dtype in (torch.int32, torch.int64) else t * 1e30,
        lambda t: t.detach().numpy(),
        lambda t: t.tolist(),
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        lambda t: torch.nested.nested_tensor([t, t]) if t.dim() else t,
    ]
    if rng.random() < 0.3:
        return plain[int(rng.integers(len(plain)))]()
    return tensors[int(rng.integers(len(tensors)))](value)


def cases(name: str, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Which argument is odd, and all of them."""
    rng = np.random.default_rng(sorted(CALLS).index(name))
    names = list(CALLS[name])
    for number in range(count):
        # Those that are written to (running averages) start afresh.
        given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in CALLS[name].items()}
        argument = names[number % len(names)]
        given[argument] = odd(given[argument], rng)
        yield argument, given


def try_odd(name: str, count: int) -> tuple[int, int]:
    """How many were taken, and refused by name; anything else fails."""
    function, taken, refused = getattr(F, name), 0, 0
    known = "|".join(inspect.signature(function).parameters)
    for number, (argument, given) in enumerate(cases(name, count)):
        try:
            function(**given)
            taken += 1
        except (TypeError, ValueError) as problem:
            words = str(problem)
            if not re.search(rf"\b({known})\b", words) or "unexpected" in words or len(words) > 1000:
                raise AssertionError(
                    f"input {number}, {argument}={given[argument]!r}: {words[:300]}"
                ) from problem
            refused += 1
        except Exception as problem:
            raise AssertionError(
                f"input {number}, {argument}={given[argument]!r}: {problem!r}"[:600]
            ) from problem
    return taken, refused


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about nested and quantised tensors
        yield


@pytest.mark.parametrize("name", sorted(CALLS))
def test_the_arguments_are_taken(name: str) -> None:
    getattr(F, name)(**CALLS[name])


@pytest.mark.parametrize("name", sorted(CALLS))
def test_odd_arguments_are_taken_or_refused_by_name(name: str) -> None:
    count = 20 if name == "render_shaders" else 100  # its reference takes a second an image
    taken, refused = try_odd(name, count)
    assert taken + refused == count


@pytest.mark.parametrize(
    "name, change",
    [
        ("denoise_step", {"clip": -1.0}),
        ("denoise_step", {"clip": 0.0}),
        ("denoise_step", {"clip": math.nan}),
        ("denoise_step", {"clip": math.inf}),
        ("denoise_step", {"clip": True}),
        ("denoise_step", {"guidance_scale": math.nan}),
        ("denoise_step", {"guidance_scale": -math.inf}),
        ("denoise_step", {"guidance_scale": "2"}),
        ("denoise_step", {"step": 1.0}),
        ("denoise_step", {"step": True}),
        ("denoise_step", {"seed": -1.0, "noise": None}),
        ("denoise_step", {"seed": 2**70, "noise": None}),
        ("denoise_step", {"history": 3}),
        ("denoise_step", {"history": (None,)}),
        ("denoise_step", {"cfg_channels": 1.5}),
        ("crop_flip_normalize", {"std": "111"}),
        ("crop_flip_normalize", {"std": (1.0, 1.0, 0.0)}),
        ("crop_flip_normalize", {"mean": None}),
        ("crop_flip_normalize", {"mean": (True, 0.0, 0.0)}),
        ("crop_flip_normalize", {"size": True}),
        ("crop_flip_normalize", {"size": (8, 8, 8)}),
        ("draw_crop_flip", {"flip": math.nan}),
        ("draw_crop_flip", {"flip": "x"}),
        ("draw_crop_flip", {"size": "88"}),
        ("draw_crop_flip", {"generator": 3}),
        ("render_leaves", {"shape": 4}),
        ("render_leaves", {"shape": (4.0, 4)}),
        ("render_leaves", {"seed": 1.5}),
        ("render_leaves", {"limit": True}),
        ("render_leaves", {"limit": None}),
        ("render_shaders", {"shape": "44"}),
        ("render_shaders", {"antialias": 1.0}),
        ("render_shaders", {"dtype": "uint8"}),
        ("bn_statistics_loss", {"running_mean": None}),
        ("bn_statistics_loss", {"average_share": "x"}),
        ("bn_statistics_loss", {"average_share": True}),
        ("kd_kl_div", {"student": logits().to_sparse()}),
        ("kd_kl_div", {"temperature": 1e308}),
        ("kd_kl_div", {"temperature": 1e-320}),
        ("kd_kl_div", {"temperature": 10**400}),
        ("kd_kl_div", {"temperature": torch.tensor([2.0]).to_sparse()}),
        ("kd_kl_div", {"reduction": np.ones(2)}),
        ("divergence_loss", {"teacher_temperature": 1e30}),
        ("divergence_loss", {"kind": ["jsd"]}),
        ("distillation_loss", {"ignore_index": "x"}),
        ("distillation_loss", {"ignore_index": 1.0}),
        ("distillation_loss", {"ignore_index": True}),
        ("distillation_loss", {"ignore_index": -(2**70)}),
        ("distillation_loss", {"target": torch.tensor([0, 1, 2, 3]).to_sparse()}),
        ("dkd_loss", {"ignore_index": None}),
        ("dkd_loss", {"beta": 1e308}),
        ("topk_kd_loss", {"indices": torch.ones(4, 2, dtype=torch.int64).to_sparse()}),
        ("topk_kd_loss", {"tail": np.ones(2)}),
        ("fused_linear_kd_loss", {"student_weight": logits(5, 3).to_sparse()}),
        ("fused_linear_kd_loss", {"teacher_bias": 3}),
        ("noise_mix", {"gamma": torch.ones(4).to_sparse()}),
        ("noise_mse", {"prediction": torch.ones(4).to_sparse()}),
        ("add_noise_embed", {"timesteps": torch.ones(2, dtype=torch.int64).to_sparse()}),
        ("reparam_middle_loss", {"carry_gradient": np.ones(2)}),
        ("denoise_step", {"guidance_scale": 1e308}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_makes_no_sense_is_refused_by_name(name: str, change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(change))):
        getattr(F, name)(**(CALLS[name] | change))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_thousand_odd_arguments() -> None:
    count = -(-20_000 // len(CALLS))
    found = {name: try_odd(name, count) for name in sorted(CALLS)}
    taken = sum(t for t, _ in found.values())
    print(f"{count * len(CALLS)} calls: {taken} taken, {count * len(CALLS) - taken} refused by name")
