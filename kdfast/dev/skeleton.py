"""A new family of kernels: every file of a working row loss, and every line that the rest of the tree needs of it."""

from __future__ import annotations

import keyword
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import NamedTuple

from kdfast.errors import ConfigError

__all__ = ["CHECKOUT", "new_op"]

TEMPLATES = Path(__file__).parent / "templates"
#: Where this package runs from, which is a checkout after an editable installation.
CHECKOUT = Path(__file__).parents[2]
#: What a checkout has, and an installed package has not.
SIGNS = (
    "pyproject.toml",
    "kernels/launch.py",
    "tests/support/conformance.py",
    "bench/suites.py",
    "docs/mkdocs.yml",
)

#: The files of a new family, and the template of each (None: an empty file).
FILES = {
    "kernels/${name}/__init__.py": "kernels_init.py.txt",
    "kernels/${name}/plan.py": "kernels_plan.py.txt",
    "kernels/${name}/launch.py": "kernels_launch.py.txt",
    "kernels/${name}/rows.py": "kernels_rows.py.txt",
    "kdfast/reference/${name}.py": "reference.py.txt",
    "kdfast/ops/${name}.py": "ops.py.txt",
    "kdfast/functional/${name}.py": "functional.py.txt",
    "kdfast/nn/${name}.py": "nn.py.txt",
    "tests/kernels/${name}/__init__.py": None,
    "tests/kernels/${name}/test_${name}.py": "test.py.txt",
    "bench/test_${name}.py": "bench.py.txt",
    "docs/pages/kernels/${name}.md": "page.md.txt",
}


class Insertion(NamedTuple):
    """Lines for a file that is there.

    Attributes:
        path: From the root.
        text: To be inserted.
        at: A pattern that the file has; the first match counts.
        before: Whether the text goes before the match, not behind it.
    """

    path: str
    text: str
    at: str
    before: bool = False


#: Where the tree says what there is. Imports and ``__all__`` are sorted by ruff afterwards.
FUTURE, PUBLIC = r"^from __future__ import annotations\n", r"^__all__ = \[\n"
INSERTIONS = (
    Insertion("kdfast/functional/__init__.py", "from kdfast.functional.${name} import ${function}\n", FUTURE),
    Insertion("kdfast/functional/__init__.py", '    "${function}",\n', PUBLIC),
    Insertion("kdfast/nn/__init__.py", "from kdfast.nn.${name} import ${Class}Loss\n", FUTURE),
    Insertion("kdfast/nn/__init__.py", '    "${Class}Loss",\n', PUBLIC),
    Insertion(
        "kdfast/benchmarks/run.py", '    "${name}": ("losses",),\n', r'^    "linear": \("linear",\),\n'
    ),
    Insertion("kdfast/benchmarks/losses.py", "from kdfast.functional import ${function}\n", FUTURE),
    Insertion(
        "kdfast/benchmarks/losses.py",
        "def eager_${name}(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:\n"
        '    """Half the squared distance of logits (Ba & Caruana 2014, Eq. 1)."""\n'
        "    return 0.5 * (student - teacher).square().sum() / student.shape[0]\n\n\n",
        r"^def cases\(",
        before=True,
    ),
    Insertion(
        "kdfast/benchmarks/losses.py",
        '    ${name} = _Loss("${function}", "${name}", eager_${name}, ${function}, _pair)\n'
        "    yield _case(${name}, kin, settings, _Moves(12, None, 3))\n",
        r"^    yield _case\(cached, .*\n",
    ),
    Insertion("bench/audit_table.py", "from kdfast.kernels import ${name}\n", FUTURE),
    Insertion(
        "bench/audit_table.py",
        "def _${name}(shape: tuple[int, int], dtype: torch.dtype) -> Callable[[], object]:\n"
        "    def call() -> object:\n"
        "        student, teacher = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype)\n"
        "        gradients = torch.empty_like(student), None\n"
        "        return ${name}.LAUNCHES((student, teacher), gradients, 1, SCALE, TOTAL)\n\n"
        "    return call\n\n\n",
        r"^bf16, fp32 = ",
        before=True,
    ),
    Insertion(
        "bench/audit_table.py",
        '    Variant("${name}: 1000 bf16", _${name}((4096, 1000), bf16), 6, 16, 16, fast=True),\n',
        r'^    Variant\("dist: .*\n',
    ),
    Insertion("docs/mkdocs.yml", "      - kernels/${name}.md\n", r"^      - kernels/linear\.md\n"),
    Insertion(
        "docs/pages/kernels/index.md",
        "| [${name}](${name}.md) | half the squared distance of logits | `${function}`, `nn.${Class}Loss` |\n",
        r"^\| \[linear\].*\n",
    ),
    Insertion(
        "docs/pages/api/functional.md",
        "\n::: kdfast.functional.${function}\n",
        r"^::: kdfast\.functional\.fused_linear.*\n",
    ),
    Insertion(
        "docs/pages/api/nn.md", "\n::: kdfast.nn.${Class}Loss\n", r"^::: kdfast\.nn\.FusedLinearKDLoss\n"
    ),
    Insertion(
        "CHANGELOG.md",
        "- `${function}` and `${Class}Loss`: half the squared distance of logits.\n",
        r"^### Added\n\n",
    ),
)


def new_op(name: str, root: Path = CHECKOUT) -> tuple[list[str], list[str]]:
    """Write a new family of kernels into a checkout: a squared error of logits, working and tested.

    Nothing is written unless all of it can be.

    Args:
        name: Of the family, in snake case; a final ``_loss`` is taken for the function's.
        root: The checkout.

    Returns:
        Paths from ``root``: files that are new, and files that have new lines.

    Raises:
        ConfigError: A name that cannot be a module's or is taken, a folder that is no checkout, ruff not installed,
            or a file that no longer has the line beside which something belongs.
    """
    family = name.removesuffix("_loss")
    _check(family, name, root)
    words = {
        "name": family,
        "function": f"{family}_loss",
        "Class": "".join(word.capitalize() for word in family.split("_")),
    }
    new = {
        Template(path).substitute(words): ""
        if template is None
        else Template((TEMPLATES / template).read_text()).substitute(words)
        for path, template in FILES.items()
    }
    taken = [path for path in new if (root / path).exists()]
    if taken:
        raise ConfigError(f"name: got {name!r}, but {', '.join(taken)} is there already; choose another")
    changed = _inserted(root, words)
    for path, text in (new | changed).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    _tidy(root, [path for path in (*new, *changed) if path.endswith(".py")])
    return list(new), list(changed)


def _check(family: str, name: str, root: Path) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", family) or keyword.iskeyword(family):
        raise ConfigError(f"name: got {name!r}; a Python name in snake case is needed, such as logit_mse")
    lacking = [sign for sign in SIGNS if not (root / sign).is_file()]
    if lacking:
        raise ConfigError(
            f"root: {root} is no checkout of kdfast: it has no {', '.join(lacking)}. Ops are added in a clone of the "
            "repository, after `make install` there; or pass --root"
        )
    for taken in (root / "kernels" / family, root / "kdfast" / family, root / "kdfast" / f"{family}.py"):
        if taken.exists():
            raise ConfigError(
                f"name: got {name!r}, but {taken.relative_to(root)} is there already; choose another"
            )
    if find_spec("ruff") is None:
        raise ConfigError('ruff is not installed, which sorts imports; pip install "kdfast[dev]"')


def _inserted(root: Path, words: dict[str, str]) -> dict[str, str]:
    """The changed files' texts; none is written yet."""
    texts: dict[str, str] = {}
    for path, text, at, before in INSERTIONS:
        content = texts.get(path) or (root / path).read_text()
        found = re.search(at, content, re.MULTILINE)
        if found is None:
            raise ConfigError(
                f"{path}: has no line like {at!r}, beside which the new op is named; see INSERTIONS"
            )
        position = found.start() if before else found.end()
        texts[path] = content[:position] + Template(text).substitute(words) + content[position:]
    return texts


def _tidy(root: Path, paths: list[str]) -> None:
    """Sorted imports and ``__all__``, and the line breaks that the length of the name asks for."""
    for command in (["check", "--quiet", "--fix", "--select", "I,RUF022"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *paths], cwd=root, check=True)
