"""Slips that newcomers make, and what they are told: the argument, what it got, and what is accepted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from kdfast import methods
from kdfast.cli.app import app
from kdfast.errors import ConfigError
from kdfast.experiments.distill.run import parse

METHODS = [
    (methods.DMKD, methods.DMKDConfig),
    (methods.SurrogateKD, methods.SurrogateKDConfig),
    (methods.SSDKD, methods.SSDKDConfig),
    (methods.DiffKD, methods.DiffKDConfig),
    (methods.KD, methods.KDConfig),
]


@pytest.mark.parametrize(("method", "config"), METHODS)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_config_in_a_networks_place(method: Any, config: Any, role: str) -> None:
    settings = object.__new__(config)  # any settings: nobody looks into them
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2).eval().requires_grad_(False)
    networks = (settings, teacher) if role == "student" else (student, settings)
    with pytest.raises(TypeError, match=rf"^{role}: got a {config.__name__}, accepted: a network .*config=…"):
        method(*networks)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"method": "fitnet", "student_layers": "layer3"},
            "student_layers: got 'layer3', accepted: a list, as in [layer3]",
        ),
        ({"augment": "crop,flip"}, "augment: got 'crop,flip', accepted: a list, as in [crop,flip]"),
        ({"augment": 3}, "augment: got 3, accepted: a list, as in [a, b]"),
    ],
)
def test_values_of_another_kind(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse({"teacher": "runs/t", "student": "resnet8", "data": "digits", **values})


@pytest.mark.parametrize(
    ("value", "words"),
    [("ten", "a valid integer"), (2.5, "a valid integer, got a number with a fractional part")],
)
def test_a_number_is_refused_without_the_parsers_words(value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"epochs: got {value!r}, accepted: {words}$"):
        parse({"teacher": "runs/t", "student": "resnet8", "data": "digits", "epochs": value})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("teach", "--device", "cuda"), "--device: device is a key, not an option: write device=cuda"),
        (
            ("teach", "--image-size=64"),
            "--image-size: image_size is a key, not an option: write image_size=64",
        ),
        (("distill", "--temperature", "4", "--quiet"), "write temperature=4 at the end of the line"),
        (("distill", "--epochs", "--quiet"), "write epochs=VALUE"),
        (("synth", "--steps", "5"), "write steps=5"),
    ],
)
def test_a_key_written_as_an_option(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "x")])
    assert (result.exit_code, result.stderr.count("\n"), said in result.stderr) == (2, 1, True), result.stderr
    assert not (tmp_path / "x").exists()


def test_an_option_that_is_no_key_either_is_clicks_to_refuse(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["teach", "--nonsense", "4", "--out", str(tmp_path / "x")])
    assert (result.exit_code, "No such option: --nonsense" in result.stderr) == (2, True)


def test_distill_goes_without_a_recipe(tmp_path: Path) -> None:
    out = ["distill", "--out", str(tmp_path / "x"), "-q"]
    result = CliRunner().invoke(app, [*out, "method=kd", "student=resnet8", "data=digits"])
    assert (result.exit_code, "distill: teacher: missing; in a shell: teacher=VALUE" in result.stderr) == (
        2,
        True,
    )
    result = CliRunner().invoke(app, [*out, "method=kd", "tacher=x"])
    assert (result.exit_code, "did you mean 'teacher'?" in result.stderr) == (2, True)
