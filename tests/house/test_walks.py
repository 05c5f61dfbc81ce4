"""The first hour, walked: what README and the pages tell people to type runs as printed, and so do four walks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support.house import leftovers

ROOT = Path(__file__).parents[2]
WALKS = ROOT / "tests" / "walks"
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: What a newcomer would not know what to do about.
FROWN = re.compile(r"Traceback|Warning\b|\bwarnings?\.warn|deprecated", re.IGNORECASE)
#: Sections whose lines are run, in order, in an empty folder.
RUN = [("README.md", "## In a shell"), ("docs/pages/quickstart.md", "## From nothing to a student")]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that has the wheel, and sees this one's packages but not the checkout."""
    base = tmp_path_factory.mktemp("walks")
    # A copy: two processes that build in one checkout take each other's files away.
    tree = shutil.copytree(ROOT, base / "tree", ignore=leftovers)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", base / "dist", tree]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    venv.create(base / "venv", with_pip=False, symlinks=True)
    (site,) = (base / "venv" / "lib").glob("python*/site-packages")
    others = [entry for entry in sys.path if entry.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))
    (wheel,) = (base / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    python = base / "venv" / "bin" / "python"
    command = python.with_name("kdfast")
    command.write_text(f"#!{python}\nfrom kdfast.cli import main\n\nmain()\n")
    command.chmod(0o755)
    where = [str(python), "-c", "import kdfast; print(kdfast.__file__)"]
    found = subprocess.run(where, check=True, capture_output=True, text=True, cwd=base).stdout
    assert str(site) in found, found
    return python


def walked(python: Path, script: str | Path, folder: Path, *words: str) -> str:
    """What a shell says that walks there; fails where a line does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{python.parent}:{environment['PATH']}", "KDFAST_BACKEND": "auto"}
    given = ["-c", script] if isinstance(script, str) else [str(script)]
    done = subprocess.run(
        ["bash", *given, *words], cwd=folder, capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("page", "section"), RUN)
def test_what_the_pages_say_runs_as_printed(clean: Path, tmp_path: Path, page: str, section: str) -> None:
    text = (ROOT / page).read_text()
    block = BLOCK.search(text, text.index(f"\n{section}\n"))
    assert block is not None
    said = walked(clean, f"set -euo pipefail\n{block[1]}", tmp_path)
    assert [line for line in said.splitlines() if FROWN.search(line)] == []
    assert (tmp_path / "runs" / "student" / "export" / "model.pt2").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("walk", sorted(WALKS.glob("*.sh")), ids=lambda path: path.stem)
def test_a_newcomers_walk(clean: Path, tmp_path: Path, walk: Path) -> None:
    said = walked(clean, walk, tmp_path, str(clean), str(WALKS))
    assert [line for line in said.splitlines() if FROWN.search(line)] == []


def test_the_folders_walk_types_what_the_quickstart_prints() -> None:
    text = (ROOT / "docs" / "pages" / "quickstart.md").read_text()
    block = BLOCK.search(text, text.index("\n## With a folder of your own\n"))
    assert block is not None
    walk = (WALKS / "folder.sh").read_text().replace(" 2>said", "")
    commands = [
        line for line in re.split(r"\n(?! )", block[1]) if line.startswith(("kdfast teach", "kdfast distill"))
    ]
    assert [line for line in commands if line not in walk] == []
    assert len(commands) == 2
