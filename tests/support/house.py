"""What every family of kernels has on each floor, as a function over a tree, so that a test can try it on another."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

#: Where the page says what belongs into a room.
PAGE = "docs/pages/contributing.md#adding-an-op"
#: What the docstring of kernels/FAMILY/__init__.py has: a name for the message, and what shows that it is there.
DOCSTRING = {
    "the equation (an indented block with = or ←)": re.compile(r"^ {4}.*[=←]", re.MULTILINE),
    "the bytes moved": re.compile(r"^\s*Bytes moved\b", re.MULTILINE),
    "the launch plan": re.compile(r"^\s*Launch plans?[:.]", re.MULTILINE),
}


def families(root: Path) -> list[str]:
    """Every folder of kernels/ is a family, but for what they share."""
    return sorted({path.parent.name for path in (root / "kernels").glob("*/*.py")} - {"common"})


def room(path: Path) -> Path | None:
    """A family's file, or its folder where it has outgrown one."""
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


def missing_rooms(root: Path, family: str) -> list[str]:
    """One line for each thing that a family lacks: which family, which file, and what is to be in it."""
    found = [*_kernels(root, family)]
    for floor, what in (("reference", "the definition in plain PyTorch"), ("ops", "the registered op")):
        if room(root / "kdfast" / floor / family) is None:
            found.append((f"kdfast/{floor}/{family}.py (or a folder {family}/)", what))
    if not (room(root / "kdfast" / "functional" / family) or room(root / "kdfast" / family)):
        found.append(
            (f"kdfast/functional/{family}.py (or a package kdfast/{family}/)", "the public function")
        )
    tests = (root / "tests" / "kernels" / family).glob("test_*.py")
    if not any("(ConformanceSuite)" in path.read_text() for path in tests):
        found.append(
            (f"tests/kernels/{family}/test_{family}.py", "a subclass of ConformanceSuite, with cases")
        )
    bench = root / "bench" / f"test_{family}.py"
    if not bench.is_file() or f'suites.family("{family}")' not in bench.read_text():
        found.append((f"bench/test_{family}.py", f'the cases of suites.family("{family}")'))
    page = f"kernels/{family}.md"
    if not (root / "docs" / "pages" / page).is_file():
        found.append((f"docs/pages/{page}", "the family's page"))
    if not re.search(rf"^\s*- {re.escape(page)}$", (root / "docs" / "mkdocs.yml").read_text(), re.MULTILINE):
        found.append(("docs/mkdocs.yml", f"{page} in the nav"))
    return [f"family {family}: {path} is missing: {what} ({PAGE})" for path, what in found]


def _kernels(root: Path, family: str) -> list[tuple[str, str]]:
    folder = root / "kernels" / family
    package = folder / "__init__.py"
    if not package.is_file():
        return [(f"kernels/{family}/__init__.py", "equation, bytes moved, launch plan, and what ops/ calls")]
    docstring = ast.get_docstring(ast.parse(package.read_text()), clean=False) or ""
    found = [
        (f"the docstring of kernels/{family}/__init__.py", what)
        for what, sign in DOCSTRING.items()
        if not sign.search(docstring)
    ]
    plans = re.compile(r"^def \w*plan\(", re.MULTILINE)
    if not (folder / "plan.py").is_file() and not any(
        plans.search(path.read_text()) for path in folder.glob("*.py")
    ):
        found.append(
            (f"kernels/{family}/plan.py", "the launch plan as a named function (or NAME_plan in launch.py)")
        )
    return found


ROOT = Path(__file__).parents[2]
ANYWHERE = shutil.ignore_patterns(".venv*", ".*_cache", "__pycache__", "site", "*.egg-info", "*.so")
AT_THE_TOP = {".git", ".hypothesis", ".benchmarks", "build", "dist", "out"}


def leftovers(folder: str, names: list[str]) -> set[str]:
    """What builds leave behind, as .gitignore has it: a family may well be called `dist`."""
    return ANYWHERE(folder, names) | (AT_THE_TOP & set(names) if Path(folder) == ROOT else set())
