"""One process writes an --out at a time; the other is refused before any work, and told whose it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdfast.cli.app import app
from kdfast.errors import ConfigError
from kdfast.experiments.common.results import LOCK, lock_run, release_run, writing

HOLDER = """
import sys, time
from pathlib import Path
from kdfast.disk import Lock
from kdfast.errors import ConfigError
Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
lock = Lock(Path(sys.argv[1]), what="x", error=ConfigError)
print("held", flush=True)
time.sleep(60)
"""
COMMANDS = {
    "teach": ["teach", "--data", "digits", "--out", "OUT", "model=resnet8", "device=cpu"],
    "synth": ["synth", "--source", "noise", "--images", "8", "--out", "OUT"],
    "select": ["select", "SET", "TEACHER", "budget=4", "--out", "OUT"],
    "label": ["label", "SET", "TEACHER", "--out", "OUT"],
    "data-report": ["data-report", "SET", "TEACHER", "--out", "OUT"],
    "eval": ["eval", "TEACHER", "--data", "digits", "--out", "OUT"],
    "bench": ["bench", "--quick", "--suite", "losses", "--out", "OUT"],
    "demo": ["demo", "--out", "OUT"],
    "report": ["report", "OUT"],
}


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds tmp_path/out by this lock."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out" / request.param)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def call(name: str, folder: Path) -> tuple[int, str]:
    words = {"OUT": "out", "SET": "set", "TEACHER": "teacher"}
    arguments = [str(folder / words[word]) if word in words else word for word in COMMANDS[name]]
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize(
    "name, holder",
    [(name, ".report.lock" if name == "report" else LOCK) for name in COMMANDS],
    indirect=["holder"],
    ids=list(COMMANDS),
)
def test_a_second_process_is_refused_and_told_whose_it_is(
    tmp_path: Path, name: str, holder: subprocess.Popen[str]
) -> None:
    code, words = call(name, tmp_path)
    assert code == 2, words
    assert f"process {holder.pid}" in words
    assert "is writing here" in words


@pytest.mark.parametrize("holder", [LOCK], indirect=True)
def test_a_killed_process_lets_go(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert call("synth", tmp_path)[0] == 2
    holder.kill()
    holder.wait()
    code, words = call("synth", tmp_path)
    assert code == 0, words
    assert (tmp_path / "out" / "metrics.json").exists()
    assert call("report", tmp_path)[0] == 0  # and nothing of it is held by this process


@pytest.mark.parametrize("holder", [LOCK], indirect=True)
def test_a_run_in_progress_can_be_reported_on(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    (tmp_path / "out" / "metrics.json").write_text('{"accuracy": 0.5}')
    code, words = call("report", tmp_path)
    assert code == 0, words


@pytest.mark.parametrize("holder", [LOCK], indirect=True)
def test_training_takes_the_same_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(ConfigError, match=rf"process {holder.pid} on .*, started"):
        lock_run(tmp_path / "out")


def test_a_command_within_a_command_writes_on(tmp_path: Path) -> None:
    with writing(tmp_path / "out") as outer:
        with writing(tmp_path / "out") as inner:
            assert inner == outer
        (outer / "x").write_text("x")
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            _elsewhere(outer)
    _elsewhere(outer)


def _elsewhere(folder: Path) -> None:
    """What another process would do."""
    from kdfast.disk import Lock

    Lock(folder / LOCK, what=str(folder), error=ConfigError).release()


def test_a_command_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing(tmp_path / "out"):
        raise RuntimeError
    assert not (tmp_path / "out").exists()
    with writing(tmp_path / "out") as folder:
        (folder / "kept").write_text("x")
    assert (tmp_path / "out" / "kept").exists()
    release_run(tmp_path / "out")
