"""The commands as Python functions: the same work, the same results and refusals as in a shell."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kdfast
from kdfast import commands, distill, evaluate, synth, teach
from kdfast.cli.app import app
from kdfast.errors import ConfigError
from tests.data.test_splits import classes_of

TINY = {"model": "resnet8", "image_size": 8, "epochs": 1, "batch_size": 16, "tensorboard": False}


def test_the_whole_path_in_python_is_that_of_the_shell(tmp_path: Path) -> None:
    data = classes_of(tmp_path / "set", 16)
    quiet = {"progress": False}
    taught = teach(data=data, out=tmp_path / "teacher", **TINY, **quiet)
    words = ["teach", "--data", str(data), "--out", str(tmp_path / "same"), "-q", "--json"]
    words += [f"{key}={str(value).lower()}" for key, value in TINY.items()]
    said = json.loads(CliRunner().invoke(app, words).output)
    assert {**said, "seconds": 0} == {**taught, "seconds": 0}
    made = synth(source="noise", out=tmp_path / "noise", images=32, image_size=8, num_classes=2, **quiet)
    assert made["images"] == 32
    (tmp_path / "kd.yaml").write_text("method: kd\nstudent: wrn_16_1\nepochs: 7\n")
    student = distill(
        recipe=tmp_path / "kd.yaml",
        teacher=tmp_path / "teacher",
        data=data,
        test_data=data,
        student="resnet8",
        epochs=1,
        batch_size=16,
        tensorboard=False,
        out=tmp_path / "student",
        **quiet,
    )
    assert student["steps"] == 2
    measured = evaluate(tmp_path / "student", data, split="test", progress=False)
    assert measured["accuracy"] == student["accuracy"]


def test_refusals_are_those_of_the_commands(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teach: unknown key 'epoch' \(did you mean 'epochs'\?\)"):
        teach(data="digits", out=tmp_path, epoch=1)
    with pytest.raises(ConfigError, match="distill: teacher: missing"):
        distill(out=tmp_path, method="kd", student="resnet8", data="digits")
    with pytest.raises(ValueError, match="seeds: got 0, accepted: at least 1"):
        distill(out=tmp_path, seeds=0)


def test_every_function_is_a_command_and_documented() -> None:
    names = {command.name or "" for command in app.registered_commands} | {
        str(command.callback.__name__) for command in app.registered_commands if command.callback
    }
    for name in commands.__all__:
        assert name in names, name
        assert f"kdfast {'eval' if name == 'evaluate' else name.replace('_', '-')}" in str(
            inspect.getdoc(getattr(commands, name))
        )
        assert name == "report" or getattr(kdfast, name) is getattr(commands, name)
