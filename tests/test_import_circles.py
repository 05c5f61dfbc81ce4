"""No two files of the package import each other, however long the way round: imports inside of functions count, and
those that only a type checker reads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What `kernels/` is installed as.
PACKAGES = {"kdfast": ROOT / "kdfast", "kdfast.kernels": ROOT / "kernels"}

Graph = Mapping[str, set[str]]


def module_files(packages: Mapping[str, Path]) -> dict[str, Path]:
    """Every file by the name that it is imported under; a package's name stands for its ``__init__.py``."""
    found = {}
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports_of(name: str, path: Path, known: Iterable[str]) -> set[str]:
    """The files of ``known`` that this one names in an import statement, at any depth."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            home = ".".join(filter(None, (above, node.module)))
            # What is imported from a package may be a file in it, or a name of its __init__.
            inside = {f"{home}.{alias.name}" for alias in node.names}
            found |= {each if each in known else home for each in inside}
    return found & set(known) - {name}


def import_graph(packages: Mapping[str, Path]) -> dict[str, set[str]]:
    """What each file imports of the others."""
    files = module_files(packages)
    return {name: imports_of(name, path, files) for name, path in files.items()}


def reachable(graph: Graph, start: str) -> set[str]:
    """Whatever can be come to from the files that ``start`` imports."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph[name])
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Of each set of files that all reach each other, one way round that is as short as any from its first file."""
    ahead = {name: reachable(graph, name) for name in graph}
    found, seen = [], set()
    for name in sorted(graph):
        if name in seen or name not in ahead[name]:
            continue
        seen |= {other for other in ahead[name] if name in ahead[other]}
        found.append(shortest_round(graph, name))
    return found


def shortest_round(graph: Graph, start: str) -> list[str]:
    """From a file through its imports back to itself."""
    ways = [[start]]
    for way in ways:
        for name in sorted(graph[way[-1]]):
            if name == start:
                return [*way, start]
            if all(name != taken for other in ways for taken in other):
                ways.append([*way, name])
    raise AssertionError(f"{start} imports nothing that leads back to it")


def test_no_circle_of_imports():
    graph = import_graph(PACKAGES)
    assert {"kdfast", "kdfast.cli.app", "kdfast.kernels.launch"} <= graph.keys()
    assert "kdfast.kernels.launch" in reachable(graph, "kdfast.functional")  # both trees are one graph
    found = circles(graph)
    assert not found, "files import each other:\n" + "\n".join("  " + " -> ".join(way) for way in found)


@pytest.mark.parametrize(
    ("files", "way"),
    [
        ({"a.py": "import p.b", "b.py": "from p import a"}, ["p.a", "p.b", "p.a"]),
        ({"a.py": "from . import b", "b.py": "def f():\n    from .a import x"}, ["p.a", "p.b", "p.a"]),
        (
            {
                "a.py": "if TYPE_CHECKING:\n    from p.b import B",
                "b.py": "from p.c import C",
                "c.py": "import p.a",
            },
            ["p.a", "p.b", "p.c", "p.a"],
        ),
        ({"__init__.py": "from p.a import x", "a.py": "from p import y"}, ["p", "p.a", "p"]),
        ({"q/__init__.py": "from .a import x", "q/a.py": "from ..q import x"}, ["p.q", "p.q.a", "p.q"]),
        ({"q/__init__.py": "from .a import x", "q/a.py": "from .b import x", "q/b.py": "import os"}, None),
        ({"a.py": "from p import b, c", "b.py": "from p import c", "c.py": ""}, None),
    ],
    ids=["plain", "in a function", "for types", "init and child", "relative", "re-export", "diamond"],
)
def test_what_counts_as_a_circle(tmp_path, files, way):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert circles(import_graph({"p": tmp_path})) == ([way] if way else [])
