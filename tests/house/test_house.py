"""The rules that keep the tree readable: what lies where, how long a file may be, what is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import kdfast
from tests.support.house import families, missing_rooms

ROOT = Path(__file__).parents[2]
TOP_LEVEL = {
    *("pyproject.toml", "setup.py", "csrc", "kdfast", "kernels", "tests", "bench", "recipes", "docs"),
    *("README.md", "LICENSE", "CHANGELOG.md", "Makefile", ".ci", ".clang-format", ".gitignore"),
}
FAMILIES = families(ROOT)


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Every file under version control."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_top_level_is_exactly_this(tracked: list[Path]) -> None:
    assert {path.parts[0] for path in tracked} == TOP_LEVEL


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_all_its_rooms(family: str) -> None:
    """Kernel, reference, op, public function, tests, benchmark and page carry one name."""
    missing = missing_rooms(ROOT, family)
    assert missing == [], "\n".join(missing)


def test_the_benchmarks_name_every_family() -> None:
    from kdfast.benchmarks import FAMILIES as measured

    lacking = [name for name in FAMILIES if name not in measured]
    assert lacking == [], f"FAMILIES in kdfast/benchmarks/run.py lacks {lacking} (docs/pages/benchmarks.md)"
    without = [name for name in measured if name not in FAMILIES]
    assert without == [], f"FAMILIES in kdfast/benchmarks/run.py names {without}; kernels/ has no such folder"


def test_pytest_looks_into_every_folder_of_tests(tracked: list[Path], request: pytest.FixtureRequest) -> None:
    """A folder that it passes over is a family whose tests nobody runs, and nobody misses."""
    folders = {name for path in tracked if path.parts[0] == "tests" for name in path.parts[1:-1]}
    passed_over = [
        name
        for name in sorted(folders)
        for pattern in request.config.getini("norecursedirs")
        if fnmatch(name, pattern)
    ]
    assert "dist" in folders
    assert passed_over == []


def test_every_test_file_tests_something(tracked: list[Path]) -> None:
    """pytest says nothing about a file that a merge has emptied."""
    files = [path for path in tracked if path.name.startswith("test_") and path.suffix == ".py"]
    empty = [
        str(path)
        for path in files
        if not re.search(r"(?m)^( *def test_|class Test)", (ROOT / path).read_text())
    ]
    assert len(files) > 100
    assert empty == []


@pytest.fixture
def small_house(tmp_path: Path) -> Path:
    """A tree with one family, `topk`: every file that the rule looks at, copied from this one."""
    for name in ("kernels/topk", "tests/kernels/topk"):
        shutil.copytree(ROOT / name, tmp_path / name)
    files = (f"kdfast/{floor}/topk.py" for floor in ("reference", "ops", "functional"))
    for name in (*files, "bench/test_topk.py", "docs/pages/kernels/topk.md", "docs/mkdocs.yml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert (families(tmp_path), missing_rooms(tmp_path, "topk")) == (["topk"], [])
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "kernels/topk/__init__.py",
        "kdfast/reference/topk.py",
        "kdfast/ops/topk.py",
        "kdfast/functional/topk.py",
        "tests/kernels/topk/test_topk.py",
        "bench/test_topk.py",
        "docs/pages/kernels/topk.md",
    ],
)
def test_a_missing_room_is_named(small_house: Path, name: str) -> None:
    (small_house / name).unlink()
    (line,) = missing_rooms(small_house, "topk")
    assert line.startswith("family topk: ")
    assert name in line
    assert "docs/pages/contributing.md#adding-an-op" in line


@pytest.mark.parametrize(
    ("name", "text", "lacks"),
    [
        ("kernels/topk/__init__.py", "    bucket ", "the equation"),
        ("kernels/topk/__init__.py", "Bytes moved", "the bytes moved"),
        ("kernels/topk/__init__.py", "Launch plan", "the launch plan"),
        ("tests/kernels/topk/test_topk.py", "(ConformanceSuite)", "a subclass of ConformanceSuite"),
        ("bench/test_topk.py", 'suites.family("topk")', "bench/test_topk.py"),
        ("docs/mkdocs.yml", "- kernels/topk.md", "in the nav"),
    ],
)
def test_a_room_with_nothing_in_it_is_named(small_house: Path, name: str, text: str, lacks: str) -> None:
    path = small_house / name
    content = path.read_text()
    assert text in content
    if lacks == "the equation":
        content = re.sub(r"^ {4}.*=.*$", "", content.partition('"""\n\nfrom')[0], flags=re.M) + '"""\n'
    path.write_text(content.replace(text, "gone"))
    (line,) = missing_rooms(small_house, "topk")
    assert lacks in line


def test_a_folder_of_kernels_alone_is_no_family(small_house: Path) -> None:
    """What someone sees who begins with kernels/foo and stops: every other file, by name."""
    (small_house / "kernels" / "foo").mkdir()
    (small_house / "kernels" / "foo" / "rows.py").write_text("")
    assert families(small_house) == ["foo", "topk"]
    text = "\n".join(missing_rooms(small_house, "foo"))
    for name in (
        "kernels/foo/__init__.py",
        "kdfast/reference/foo.py",
        "kdfast/ops/foo.py",
        "kdfast/functional/foo.py",
        "tests/kernels/foo/test_foo.py",
        "bench/test_foo.py",
        "docs/pages/kernels/foo.md",
        "docs/mkdocs.yml",
    ):
        assert f"family foo: {name}" in text


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
        if path.suffix in {".png", ".svg", ".jpg", ".webp", ".npz", ".safetensors"}:
            continue
        for number, line in enumerate((ROOT / path).read_text().splitlines(), start=1):
            if UNWELCOME[what].search(line):
                hits.append(f"{path}:{number}: {line.strip()[:100]}")
    assert hits == []


def test_the_changelog_knows_this_version() -> None:
    assert f"## [{kdfast.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
