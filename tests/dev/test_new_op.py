"""`python -m kdfast.dev new-op`: what it writes passes its own tests, and what it refuses it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdfast.dev import new_op
from kdfast.dev.__main__ import main
from kdfast.dev.skeleton import FILES, INSERTIONS
from kdfast.errors import ConfigError
from tests.conftest import INTERPRETING
from tests.support.house import families, missing_rooms

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the processes that it starts choose for themselves")

ROOT = Path(__file__).parents[2]
LEFTOVERS = shutil.ignore_patterns("__pycache__", "site", "*.so", "results")
FOLDERS = ("kdfast", "kernels", "tests", "bench", "docs", "recipes")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of this checkout, whose `kdfast` is complete without an installation."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=LEFTOVERS)
    for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "setup.py"):
        shutil.copy(path, tmp_path)
    for name in ("kernels", "recipes"):
        (tmp_path / "kdfast" / name).symlink_to(tmp_path / name)
    return tmp_path


def run(tree: Path, *command: str, interpret: bool = False) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "TRITON_INTERP"))}
    env |= {"PYTHONPATH": str(tree)} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    found = subprocess.run(
        [sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True, timeout=280
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    return found.stdout


def contents(tree: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def test_a_new_family_has_every_room(tree: Path) -> None:
    written, changed = new_op("logit_mse", tree)
    assert (len(written), len(changed)) == (len(FILES), len({item.path for item in INSERTIONS}))
    assert "logit_mse" in families(tree)
    assert missing_rooms(tree, "logit_mse") == []
    assert not [path for path in written if "$" in (tree / path).read_text().replace("$$", "")]
    files = [path for path in (*written, *changed) if path.endswith(".py")]
    run(tree, "-m", "ruff", "check", *files)
    run(tree, "-m", "ruff", "format", "--check", *files)
    # What the templates call must still be there: its kernels' numbers are the slow test's.
    lines = (
        "import torch, kdfast.kernels.logit_mse",
        "from kdfast.functional import logit_mse_loss",
        "print(logit_mse_loss(torch.ones(3, 4), torch.zeros(3, 4)))",
    )
    assert run(tree, "-c", "\n".join(lines)) == "tensor(2.)\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logit_mse", "a_rather_long_name_of_a_family_loss"])
def test_the_new_op_passes_its_own_tests(tree: Path, name: str) -> None:
    """On the reference and in the interpreter, as generated; and its bench case, its names, types and imports."""
    new_op(name, tree)
    family = name.removesuffix("_loss")
    tests = f"tests/kernels/{family}"
    where = run(tree, "-c", f"import kdfast.kernels.{family}.plan as plan; print(plan.__file__)")
    assert where.startswith(str(tree))
    passed = run(tree, "-m", "pytest", "-n0", tests)
    assert " passed" in passed
    assert "failed" not in passed
    interpreted = run(tree, "-m", "pytest", "-n0", "-m", "interpreter", tests, interpret=True)
    assert " passed" in interpreted
    run(
        tree,
        *("-m", "pytest", "-n0", "-k", f"family or room or {family} or api or reference_lists"),
        *("tests/house/test_house.py", "tests/house/test_docs.py"),
    )
    code = f"""
from dataclasses import replace
from kdfast.benchmarks import cases_of, make_settings, measure
settings = make_settings("cpu", quick=True, tiny=True)
(case,) = cases_of("{family}", settings)
kept = tuple(one for one in case.providers if one.name != "torch.compile")
print([sorted(one) for one in measure(replace(case, providers=kept), settings)["providers"]])
"""
    assert run(tree, "-c", code).count("'seconds'") == 2
    (tree / "kdfast" / "kernels").unlink()  # as in a checkout, where mypy does not see kernels/
    run(tree, "-m", "mypy", "--cache-dir", str(tree / "cache"))


@pytest.mark.parametrize("name", ["Logit", "2d", "logit-mse", "class", "_loss", "logit__mse", "logit_"])
def test_a_name_that_is_no_modules_is_refused(tree: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: got .*snake case"):
        new_op(name, tree)


@pytest.mark.parametrize("name", ["topk", "topk_loss", "replay", "nn", "backend"])
def test_a_name_that_is_taken_is_refused(tree: Path, name: str) -> None:
    before = contents(tree)
    with pytest.raises(ConfigError, match="is there already"):
        new_op(name, tree)
    assert contents(tree) == before


def test_a_file_that_is_there_is_not_written_over(tree: Path) -> None:
    (tree / "docs/pages/kernels/logit_mse.md").write_text("mine")
    before = contents(tree)
    with pytest.raises(ConfigError, match=r"docs/pages/kernels/logit_mse\.md is there already"):
        new_op("logit_mse", tree)
    assert contents(tree) == before


def test_a_line_that_has_gone_is_named_before_anything_is_written(tree: Path) -> None:
    page = tree / "docs/mkdocs.yml"
    page.write_text(page.read_text().replace("kernels/linear.md", "kernels/heads.md"))
    before = contents(tree)
    with pytest.raises(ConfigError, match=r"docs/mkdocs\.yml: has no line like"):
        new_op("logit_mse", tree)
    assert contents(tree) == before


def test_outside_a_checkout_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-op", "logit_mse", "--root", str(tmp_path)]) == 2
    assert f"{tmp_path} is no checkout of kdfast: it has no pyproject.toml" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_ruff_nothing_is_written(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.dev.skeleton.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'ruff is not installed.*pip install "kdfast\[dev\]"'):
        new_op("logit_mse", tree)


def test_the_command_says_what_is_left(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-op", "logit_mse", "--root", str(tree)]) == 0
    said = capsys.readouterr().out
    assert "kernels/logit_mse/rows.py" in said
    assert "bench.audit_table --fast --out docs/pages/kernels/audit.md" in said
