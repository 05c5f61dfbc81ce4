"""Every field of SSDKDConfig does something: none is ignored, and none is accepted where it would be."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from kdfast.errors import ConfigError
from kdfast.methods import SSDKDConfig
from tests.support.ssdkd import TINY, trajectory

#: Another value for each field, and what else must be set for it to matter.
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "capacity": (10, {}),
    "fill_epochs": (2, {}),
    "kd_passes": (2, {"kd_steps": None}),
    "kd_steps": (3, {}),
    "temperature": (4.0, {}),
    "synthesis_batch": (5, {}),
    "inversion_steps": (3, {}),
    "lr_z": (0.05, {}),
    "lr_g": (0.05, {}),
    "latent": (6, {}),
    "generator": ("scratch", {}),
    "meta": ("reptile", {}),
    "generator_width": (5, {}),
    "upsamplings": (2, {}),
    "reset_round": (1, {}),
    "keep_images": ("last", {"lr_z": 0.5, "inversion_steps": 4}),
    "bn": (1.0, {}),
    "bn_norm": ("squared", {}),
    "bn_momentum": (0.5, {}),
    "oh": (2.0, {}),
    "adv": (0.0, {}),
    "adv_mask": (False, {}),
    "target": ("teacher", {}),
    "tv": (0.1, {}),
    "l2": (0.1, {}),
    "act": (0.5, {}),
    "balance": (5.0, {}),
    "gamma": (0.5, {}),
    "diversity": (False, {}),
    "difficulty": (False, {}),
    "phi_gradient": (False, {}),
    "replay": (
        False,
        {"generator": "persistent", "diversity": False, "sampling": "uniform"},
    ),
    "sampling": ("uniform", {}),
    "alpha": (1.5, {}),
    "beta": (0.9, {}),
    "eps": (1.0, {}),
    "priority_temperature": (8.0, {}),
    "weight_in_loss": (True, {}),
    "max_normalize": (True, {}),
    "stratified": (False, {}),
    "eviction": ("lowest", {}),
    "duplicates": ("max", {"batch_size": 24}),
    "padding": (2, {}),
    "flip": (False, {}),
}
#: What moves the work without changing it; the GPU tests compare the two.
NO_DIFFERENCE = {"cuda_graphs"}


def test_every_field_is_listed() -> None:
    assert {field.name for field in fields(SSDKDConfig)} == OTHER.keys() | NO_DIFFERENCE


@pytest.mark.parametrize("name", OTHER)
def test_no_flag_is_ignored(name: str) -> None:
    """The images that are made, or the losses on them, differ within four rounds."""
    value, needed = OTHER[name]
    assert {**TINY, **needed}.get(name, getattr(SSDKDConfig(), name)) != value
    before, after = trajectory(**needed), trajectory(**{**needed, name: value})
    assert before.shape != after.shape or not torch.equal(before, after)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"generator": "dcgan"}, "generator: got 'dcgan', accepted: meta, scratch, persistent, pixels"),
        ({"meta": "maml"}, "meta: got 'maml'"),
        ({"target": "real"}, "target: got 'real'"),
        ({"bn_norm": "l1"}, "bn_norm: got 'l1'"),
        ({"sampling": "greedy"}, "sampling: got 'greedy'"),
        ({"keep_images": "all"}, "keep_images: got 'all'"),
        ({"eviction": "random"}, "eviction: got 'random'"),
        ({"duplicates": "first"}, "duplicates: got 'first'"),
        ({"capacity": 0}, "capacity: got 0, accepted: at least 1"),
        ({"inversion_steps": 0}, "inversion_steps: got 0"),
        ({"upsamplings": 0}, "upsamplings: got 0"),
        ({"kd_steps": 0}, "kd_steps: got 0, accepted: at least 1, or null"),
        ({"reset_round": 0}, "reset_round: got 0"),
        ({"fill_epochs": -1}, "fill_epochs: got -1, accepted: at least 0"),
        ({"bn": float("nan")}, "bn: got nan"),
        ({"adv": -1.0}, "adv: got -1.0, accepted: a finite number of at least 0"),
        ({"lr_z": 0.0}, "lr_z: got 0.0, accepted: a finite number above 0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"priority_temperature": 0.0}, "priority_temperature: got 0.0"),
        ({"bn_momentum": 1.0}, "bn_momentum: got 1.0"),
        ({"alpha": 2.0, "beta": 0.5}, "alpha, beta: got 2.0 and 0.5, whose product is 1, accepted: below 1"),
        ({"capacity": 100}, "synthesis_batch: got 256, accepted: at most capacity, 100"),
        ({"replay": False}, "replay: got no, accepted: yes, unless generator is persistent"),
        ({"replay": False, "generator": "persistent"}, "kd_steps: got null"),
        ({"replay": False, "generator": "persistent", "kd_steps": 5}, "diversity: got True, accepted: no"),
        (
            {"replay": False, "generator": "persistent", "kd_steps": 5, "diversity": False},
            "sampling: got priority, accepted: uniform",
        ),
    ],
)
def test_bad_configs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SSDKDConfig(**values)


def test_priorities_may_be_modulated_too() -> None:
    """sampling: modulated is another run than either; with φ = 1 it says so."""
    runs = {value: trajectory(sampling=value) for value in ("priority", "modulated", "uniform")}
    assert not torch.equal(runs["modulated"], runs["priority"])
    assert not torch.equal(runs["modulated"], runs["uniform"])
    with pytest.raises(ConfigError, match="sampling: got modulated, accepted: priority or uniform"):
        SSDKDConfig(**{**TINY, "sampling": "modulated", "diversity": False, "difficulty": False})


def test_a_run_repeats_itself() -> None:
    """Otherwise nothing above means anything."""
    assert torch.equal(trajectory(), trajectory())
    assert not torch.equal(trajectory(), trajectory(seed=1))
