"""`kdfast bench` and the GPU campaign: their command lines, exit codes and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdfast.benchmarks import SUITES
from kdfast.cli.app import app
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")
ROOT = Path(__file__).parents[2]
CAMPAIGN = ROOT / "bench" / "gpu_campaign.sh"


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


def campaign(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(CAMPAIGN), *map(str, words)],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_the_campaign_rehearses_on_a_cpu(tmp_path: Path) -> None:
    """A part that works, one whose tool is missing, and one that fails: all run, and the summary comes last."""
    broken = "import os; os._exit(3)"
    (tmp_path / "path").mkdir()
    python = tmp_path / "path" / "python"
    # Fails for the suites alone: what a broken part looks like to the ones after it.
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *kdfast.benchmarks*) exec {sys.executable} -c "{broken}";; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    outcome = campaign(tmp_path / "out", "--dry-run", PARTS="denoise ncu", PYTHON=str(python))
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert summary[0].split()[0] == "denoise"
    assert "failed with 3" in summary[0]
    assert summary[1].split()[0] == "ncu"
    assert "absent" in summary[1] or summary[1].endswith("ok")
    assert "replay: " in (tmp_path / "out" / "ncu.log").read_text()
    assert outcome.returncode == 1
    assert outcome.stdout.index("summary") > outcome.stdout.index("== ncu")


@pytest.mark.slow
def test_the_whole_campaign_rehearses_on_a_cpu(tmp_path: Path) -> None:
    outcome = campaign(tmp_path / "out", "--dry-run")
    assert outcome.returncode == 0, outcome.stdout[-4000:]
    seen = set()
    for part in ("losses", "denoise", "replay", "data", "methods"):
        rows = json.loads((tmp_path / "out" / part / "results.json").read_text())["cases"]
        assert rows
        seen |= {row["suite"] for row in rows}
    assert seen == set(SUITES)
    assert (tmp_path / "out" / "tests.xml").exists()


def test_the_campaign_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    assert campaign().returncode == 2
    assert campaign(tmp_path / "out", "--fast").returncode == 2
    unknown = campaign(tmp_path / "out", PARTS="tests speed")
    assert unknown.returncode == 2
    assert "got speed; accepted: build" in unknown.stderr
    assert not (tmp_path / "out").exists()


def test_the_campaign_fits_its_time() -> None:
    script = CAMPAIGN.read_text()
    (limits,) = [line for line in script.splitlines() if line.startswith("declare -A LIMIT=")]
    seconds = [int(word.partition("]=")[2].rstrip(")")) for word in limits.partition("(")[2].split()]
    named = dict(re.findall(r'^(KERNELS|ALL)="(.*)"$', script, re.MULTILINE))
    parts = named["ALL"].replace("$KERNELS", named["KERNELS"]).split()
    assert len(seconds) == len(parts)
    assert set(named["KERNELS"].split()) <= set(SUITES)
    assert sum(seconds) <= 9 * 60
