"""`kdfast bench`: its command line and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdfast.cli.app import app
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")


def result(path: Path, seconds: float) -> Path:
    samples = {"wall": [seconds, 1.001 * seconds, 0.999 * seconds]}
    row = {"key": "losses/kl", "providers": [{"name": "kdfast", "seconds": samples}]}
    path.write_text(json.dumps({"format": 1, "name": "here", "cases": [row]}))
    return path


@pytest.mark.parametrize(
    ("after", "code", "text"),
    [(1.5, 1, "+50.0 %"), (0.5, 0, "-50.0 %"), (1.001, 0, "0 of 1 moved beyond the noise")],
)
def test_compare_fails_on_what_became_slower(tmp_path: Path, after: float, code: int, text: str) -> None:
    files = [str(result(tmp_path / name, time)) for name, time in (("a.json", 1.0), ("b.json", after))]
    outcome = CliRunner().invoke(app, ["bench", "--compare", *files])
    assert outcome.exit_code == code, outcome.output
    assert text in outcome.stdout


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--out", "x", "--compare", "a.json", "b.json"],
        ["--compare", "a.json", "b.json"],
        ["--out", "x", "--device", "tpu"],
        ["--out", "x", "--suite", "speed"],
    ],
)
def test_usage_errors(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(app, ["bench", *words])
    assert outcome.exit_code == 2, outcome.output
    assert list(tmp_path.iterdir()) == []
