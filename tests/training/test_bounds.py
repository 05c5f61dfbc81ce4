"""Numbers that no run can use are refused where they are given, by recipes and by the classes alike."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kdfast.errors import ConfigError
from kdfast.experiments.common.recipe import build_config
from kdfast.experiments.demo.config import DemoConfig
from kdfast.experiments.select.config import SelectConfig
from kdfast.experiments.synth.config import SynthConfig
from kdfast.methods.dmkd import DMKDConfig
from kdfast.methods.surrogate import SurrogateKDConfig
from kdfast.training.config import TrainerConfig
from kdfast.training.optim import OptimizerConfig, ScheduleConfig

BAD = [math.nan, math.inf, -math.inf, -1.0]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "schema, name",
    [
        (OptimizerConfig, "lr"),
        (OptimizerConfig, "weight_decay"),
        (OptimizerConfig, "momentum"),
        (ScheduleConfig, "gamma"),
        (ScheduleConfig, "warmup_epochs"),
        (ScheduleConfig, "min_ratio"),
        (ScheduleConfig, "every"),
        (TrainerConfig, "clip_grad_norm"),
        (TrainerConfig, "ema_decay"),
        (DMKDConfig, "temperature"),
        (SurrogateKDConfig, "temperature"),
    ],
)
def test_a_class_refuses_them(schema: Any, name: str, value: float) -> None:
    needed = {"epochs": 1} if schema is TrainerConfig else {}
    with pytest.raises(ConfigError, match=rf"{name}: got .*finite"):
        schema(**needed, **{name: value})


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "schema, name",
    [(SynthConfig, "guidance_scale"), (DemoConfig, "guidance_scale"), (SelectConfig, "long_tail")],
)
def test_a_recipe_refuses_them(schema: Any, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        build_config(schema, {"out": "x", "source": "noise", name: value}, source="recipe")
