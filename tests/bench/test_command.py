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


def provider(name: str, seconds: float | None = None, **reason: str) -> dict[str, object]:
    timed = {} if seconds is None else {"seconds": {"wall": [seconds, 1.001 * seconds, 0.999 * seconds]}}
    return {"name": name, **timed, **reason}


KDFAST, EAGER = provider("kdfast", 1.0), provider("eager", 1.0)


@pytest.mark.parametrize(
    ("after", "errors", "why"),
    [
        ([KDFAST, provider("eager", 2.0)], [], None),
        ([KDFAST, provider("eager", absent="not here")], [], None),
        ([KDFAST], [], None),
        ([KDFAST, provider("eager", failed="it raised")], [], None),
        ([provider("kdfast", 1.5), provider("eager", 1.5)], [], "kdfast takes +50.0 %"),
        ([EAGER], [], "kdfast was timed before and is not now (no such row)"),
        (
            [EAGER, provider("kdfast", wrong="by 3")],
            [],
            "kdfast was timed before and is not now (wrong: by 3)",
        ),
        ([EAGER, provider("kdfast", failed="it raised")], [], "is not now (failed: it raised)"),
        ([EAGER, provider("kdfast", absent="no GPU")], [], "is not now (absent: no GPU)"),
        ([KDFAST, EAGER, provider("kdfast new", failed="it raised")], [], "kdfast new failed: it raised"),
        ([KDFAST, provider("eager", wrong="by 3")], [], "eager wrong: by 3"),
        ([KDFAST, EAGER], ["losses: stopped"], "stopped: losses: stopped"),
        ([], [], "kdfast was timed before"),
    ],
)
def test_compare_is_a_gate_for_kdfast_alone(
    tmp_path: Path, after: list[dict[str, object]], errors: list[str], why: str | None
) -> None:
    files = []
    for name, providers, stopped in (("a.json", [KDFAST, EAGER], []), ("b.json", after, errors)):
        rows = [{"key": "losses/kl", "providers": providers}] if providers else []
        (tmp_path / name).write_text(
            json.dumps({"format": 1, "name": "here", "cases": rows, "errors": stopped})
        )
        files.append(str(tmp_path / name))
    outcome = CliRunner().invoke(app, ["bench", "--compare", *files])
    assert outcome.exit_code == (0 if why is None else 1), outcome.output
    assert why is None or why in outcome.stderr
    assert len([line for line in outcome.stderr.splitlines() if line]) == (0 if why is None else 1)


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
