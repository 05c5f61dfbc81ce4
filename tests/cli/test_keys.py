"""Every key of every command is explained where people look: ``--help``, ``kdfast keys``, and a page of the docs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdfast.cli.app import app
from kdfast.experiments.distill.config import DistillConfig
from kdfast.experiments.distill.methods import METHODS, get_method
from kdfast.experiments.keys import SCHEMAS, keys_of_command, keys_of_method

ROOT = Path(__file__).parents[2]


def output(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_has_words_a_default_and_what_it_accepts(command: str) -> None:
    for key in keys_of_command(command):
        assert len(key.text) > 5, f"{command}: {key.name} lacks a line in the Attributes: of its config"
        assert key.default, key.name
        assert key.accepted, key.name


@pytest.mark.parametrize("method", METHODS)
def test_every_key_of_every_method_has_words(method: str) -> None:
    found = keys_of_method(method)
    assert {key.name for key in found} == {field.name for field in fields(get_method(method).CONFIG)}
    assert [key.name for key in found if not key.text] == []


@pytest.mark.parametrize("command", SCHEMAS)
def test_help_lists_every_key_in_80_columns(command: str) -> None:
    text = output(command, "--help")
    for key in keys_of_command(command):
        assert f"\n  {key.name} " in text, key.name
    assert max(map(len, text.splitlines())) <= 100  # borders are one column each
    below = text[text.index("Keys, in the recipe") :].splitlines()
    assert max(map(len, below[1:])) <= 80


def test_help_of_distill_shows_defaults_and_the_methods() -> None:
    text = output("distill", "--help")
    assert "  epochs              100 " in text or "  epochs            100 " in text
    assert "How long, how fast:" in text
    for name in METHODS:
        assert f"\n  {name} " in text


def test_keys_says_what_is_accepted_and_programs_can_read_it() -> None:
    text = " ".join(output("keys", "distill").split())
    assert "Highest learning rate. Accepted: number > 0." in text
    assert "Method ssdkd:" in output("keys", "distill")
    listed = {key["name"]: key for key in json.loads(output("keys", "distill", "--json"))}
    assert listed["epochs"]["default"] == "100"
    assert listed["teacher"]["default"] == "required"
    assert {field.name for field in fields(DistillConfig)} <= set(listed)
    assert [key["name"] for key in json.loads(output("keys", "distill", "dmkd", "--json"))] == [
        "temperature",
        "labels",
        "hard_labels",
        "cutmix_alpha",
    ]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("report",), "command: got 'report', accepted: teach, distill"),
        (("distill", "dmk"), "method: got 'dmk', accepted: at, "),
        (("teach", "dmkd"), "accepted: none; only distill has methods"),
    ],
)
def test_what_has_no_keys_is_refused(words: tuple[str, ...], why: str) -> None:
    result = CliRunner().invoke(app, ["keys", *words])
    assert result.exit_code == 2
    assert why in result.output


def test_the_page_of_keys_is_what_the_configs_say() -> None:
    spec = importlib.util.spec_from_file_location("keys_page", ROOT / "docs" / "keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run: python docs/keys.py"
