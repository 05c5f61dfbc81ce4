"""The rules that keep the tree readable: what lies where, how long a file may be, what is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdfast

ROOT = Path(__file__).parents[2]
TOP_LEVEL = {
    *("pyproject.toml", "setup.py", "csrc", "kdfast", "kernels", "tests", "bench", "recipes", "docs"),
    *("README.md", "LICENSE", "CHANGELOG.md", "Makefile", ".ci", ".clang-format", ".gitignore"),
}
#: Every folder in kernels/ is a family, but for what they share.
FAMILIES = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
FAMILIES.remove("common")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Every file under version control."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_top_level_is_exactly_this(tracked: list[Path]) -> None:
    assert {path.parts[0] for path in tracked} == TOP_LEVEL


def room(path: Path) -> Path | None:
    """A family's file, or its folder where it has outgrown one."""
    return next((found for found in (path.with_suffix(".py"), path) if found.exists()), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_its_four_rooms(family: str) -> None:
    """kernel, reference, op and public function carry one name, and the tests are the shared suite's."""
    for floor in ("reference", "ops"):
        assert room(ROOT / "kdfast" / floor / family), f"kernels/{family} has no kdfast/{floor}/{family}"
    assert room(ROOT / "kdfast" / "functional" / family) or room(ROOT / "kdfast" / family), (
        f"kernels/{family} has no public function: kdfast/functional/{family}"
    )
    tests = [path.read_text() for path in (ROOT / "tests" / "kernels" / family).glob("test_*.py")]
    assert any("ConformanceSuite" in text for text in tests), (
        f"tests/kernels/{family} runs no conformance suite"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_torch_and_triton_alone(path: Path) -> None:
    foreign = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add(str(node.module).split(".")[0])
    assert foreign <= {"torch", "triton", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("folder", "suffixes", "limit"),
    [
        ("kdfast", {".py"}, 400),
        ("kernels", {".py", ".cu"}, 400),
        ("csrc", {".cpp", ".hpp", ".cu"}, 400),
        ("tests", {".py"}, 500),
        ("bench", {".py"}, 500),
    ],
)
def test_files_stay_short(tracked: list[Path], folder: str, suffixes: set[str], limit: int) -> None:
    long = {}
    for path in tracked:
        if path.parts[0] == folder and path.suffix in suffixes:
            lines = len((ROOT / path).read_text().splitlines())
            if lines > limit:
                long[str(path)] = lines
    assert long == {}


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(ROOT / "kdfast")], "kdfast.")
    return ["kdfast", *sorted(info.name for info in found if "._" not in info.name)]


@pytest.mark.parametrize("name", modules())
def test_public_names_exist_and_are_documented(name: str) -> None:
    """Everything in ``__all__`` is there, and it, its module and its public methods have docstrings."""
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    missing = []
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if not callable(value) or getattr(value, "__module__", "").split(".")[0] != "kdfast":
            continue
        members = [(public, value)]
        if inspect.isclass(value):
            methods = inspect.getmembers(value, inspect.isfunction)
            ours = [(key, method) for key, method in methods if method.__module__.startswith("kdfast.")]
            members += [(f"{public}.{key}", method) for key, method in ours if not key.startswith("_")]
        missing += [key for key, member in members if not (inspect.getdoc(member) or "").strip()]
    assert missing == [], f"no docstring in {name}"


def test_the_walk_reaches_every_floor() -> None:
    floors = {name.split(".")[1] for name in modules() if "." in name}
    assert {
        "cli",
        "experiments",
        "methods",
        "diffusion",
        "training",
        "data",
        "replay",
        "functional",
    } <= floors
    assert {"nn", "ops", "reference", "models", "report", "backend", "errors"} <= floors


# Spelled so that this file does not contain what it looks for.
UNWELCOME = {
    "a path of one machine": re.compile(r"(?<![\w.])/(?:home|root|work|Users|opt)/\w"),
    "a package index": re.compile(r"(?:pypi|pythonhosted|download\.pytorch)\.org"),
    "unfinished work": re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b"),
    "a number of a tracker": re.compile(r"(?<!\w)issues? (?:no\. ?)?\d+\b", re.IGNORECASE),
}


@pytest.mark.parametrize("what", UNWELCOME)
def test_nothing_unwelcome_is_written_anywhere(tracked: list[Path], what: str) -> None:
    hits = []
    for path in tracked:
        if path.suffix in {".png", ".svg", ".jpg", ".npz", ".safetensors"}:
            continue
        for number, line in enumerate((ROOT / path).read_text().splitlines(), start=1):
            if UNWELCOME[what].search(line):
                hits.append(f"{path}:{number}: {line.strip()[:100]}")
    assert hits == []


def test_the_changelog_knows_this_version() -> None:
    assert f"## [{kdfast.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
