"""`make sanitize`, by the commands that it would run."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import INTERPRETING
from tests.sanitizer.plugin import Races

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")
ROOT = Path(__file__).parents[2]


def test_the_sanitizer_has_an_environment_of_its_own_and_is_tried_first(tmp_path: Path) -> None:
    command = ["make", "-n", "sanitize", f"VENV={tmp_path / 'venv'}"]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in plan  # kdfast's own environment is not needed
    runs = [line for line in plan.splitlines() if "--sanitize" in line and "pytest" in line]
    assert runs[0].endswith("tests/sanitizer/planted.py")
    wanted = [("90", "planted"), ("90", "tests/kernels"), ("80", "tests/kernels"), ("100", "tests/kernels")]
    assert [run.partition("--sanitize ")[2].split()[0] for run in runs] == [cc for cc, _ in wanted]
    assert all(words in run for run, (_, words) in zip(runs, wanted, strict=True))


@pytest.mark.parametrize(
    ("kernel", "buffer", "kind", "passes"),
    [
        ("replay_update", "leaves", "read-write", True),
        ("replay_update", "leaves", "write-write", False),
        ("replay_update", "delta", "read-write", False),
        ("replay_add", "leaves", "read-write", False),
    ],
)
def test_a_race_passes_where_it_is_explained(kernel: str, buffer: str, kind: str, passes: bool) -> None:
    race = SimpleNamespace(kernel=kernel, buffer=buffer, detail=f"4 byte(s) are shared this way ({kind}).")
    found = Races(ValueError)
    if passes:
        found.append(race)
        assert found == [race]
    else:
        with pytest.raises(ValueError, match=kernel):
            found.append(race)
