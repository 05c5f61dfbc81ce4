"""What the README and the documentation say is so: their code runs, their links lead somewhere, nothing is fetched."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]
API = ROOT / "docs" / "pages" / "api"
# Indented fences (in tabs) count too; what they hold is dedented by the indent of the fence.
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
#: Blocks that show a shape rather than something to run.
ELLIPSIS = "=..."


def blocks(language: str) -> list[pytest.ParameterSet]:
    found = []
    for page in PAGES:
        for match in FENCE.finditer(page.read_text()):
            if match["language"] == language and ELLIPSIS not in match["code"]:
                indent = len(match["indent"])
                code = "\n".join(line[indent:] for line in match["code"].splitlines())
                line = page.read_text()[: match.start()].count("\n") + 2
                found.append(pytest.param(page, line, code, id=f"{page.relative_to(ROOT)}:{line}"))
    return found


@pytest.mark.parametrize(("page", "line", "code"), blocks("python"))
def test_python_blocks_run(
    page: Path, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "__main__"})


def test_the_readme_shows_two_ways_to_the_same_loss() -> None:
    before, after = [block.values[2] for block in blocks("python") if block.values[0].name == "README.md"]
    values = []
    for code in (before, after):
        torch.manual_seed(0)
        scope: dict[str, torch.Tensor] = {}
        exec(str(code), scope)
        scope["loss"].backward()
        values.append((scope["loss"], scope["student"].grad))
    torch.testing.assert_close(values[0], values[1])
    assert max(len(str(block).splitlines()) for block in (before, after)) <= 6


def test_shell_blocks_name_what_exists() -> None:
    """Make targets, commands and their options, and files, as the pages write them."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    from typer.main import get_command

    from kdfast.cli.app import app

    group = get_command(app)
    commands = getattr(group, "commands")  # noqa: B009 - a click group; typer types it as a command
    wrong = []
    for block in blocks("bash"):
        for line in str(block.values[2]).splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["make"]:
                wrong += [
                    line for word in words[1:] if word.islower() and "=" not in word and word not in targets
                ]
            elif words[:1] == ["kdfast"]:
                known = {option for item in commands[words[1]].params for option in item.opts}
                wrong += [line for word in words[2:] if word.startswith("--") and word not in known]
                wrong += [
                    line for word in words[2:] if word.startswith("recipes/") and not (ROOT / word).is_file()
                ]
    assert wrong == [], "README.md and docs/pages name what the Makefile, the command line or recipes/ lack"


def test_the_picture_and_its_caption_show_one_run() -> None:
    """The numbers under the picture are those of the metrics that it was drawn from."""
    metrics = json.loads((ROOT / "docs" / "pages" / "assets" / "demo.json").read_text())
    caption = re.search(
        r"^\*From one run of `make demo`.*?\*$", (ROOT / "README.md").read_text(), re.M | re.S
    )
    assert caption is not None
    names = ("teacher", "student", "student_hard_label", "student_noise")
    want = [f"{100 * metrics[f'{name}_accuracy']:.1f}" for name in names]
    assert re.findall(r"(\d+\.\d) %", caption[0].replace("\n", " ")) == want
    assert f"seed {metrics['settings']['seed']}" in caption[0]
    assert metrics["settings"]["device"] in caption[0]


def test_relative_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    dead = [link for link in links if not (ROOT / link).exists()]
    assert dead == [], f"README.md links to what is not there: {dead}"


def test_the_readme_promises_no_method_that_is_not_there() -> None:
    """A method is offered exactly when its class can be imported, and complete only when a recipe can name it."""
    import kdfast.methods
    from kdfast.experiments.distill.methods import METHODS, get_method

    in_recipes = {get_method(name).METHOD.__name__ for name in METHODS}

    names = {
        "DM-KD": "DMKD",
        "Surrogate": "SurrogateKD",
        "SSD-KD": "SSDKD",
        "DiffKD": "DiffKD",
        "Kdiffusion": "Kdiffusion",
    }
    table = {
        name: re.search(rf"^\| \[{name}\].*$", (ROOT / "README.md").read_text(), re.MULTILINE)
        for name in names
    }
    for name, row in table.items():
        assert row is not None, name
        complete, offered = "complete" in row[0], "in your own loop" in row[0]
        assert (complete or offered) == (names[name] in kdfast.methods.__all__), row[0]
        assert not complete or names[name] in in_recipes, row[0]


MODULES = ["functional", "nn", "diffusion", "replay", "data", "models", "methods", "training"]


@pytest.mark.parametrize("name", MODULES)
def test_the_reference_lists_every_public_name(name: str) -> None:
    module = importlib.import_module(f"kdfast.{name}")
    text = "".join(page.read_text() for page in API.glob("*.md"))
    listed = set(re.findall(rf"^::: kdfast\.{name}\.(?:\w+\.)*(\w+)$", text, re.MULTILINE))
    listed |= set(
        re.findall(rf"^::: kdfast\.{name}\.(\w+)\.", text, re.MULTILINE)
    )  # a module, by what is in it
    errors = {public for public in module.__all__ if hasattr(kdfast, public)}  # listed under kdfast.errors
    lacking = sorted(set(module.__all__) - errors - listed)
    assert lacking == [], (
        f"docs/pages/api/{name}.md lists none of these: ::: kdfast.{name}.NAME for {lacking}"
    )


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_the_reference_has_its_page_with_its_names_alone(name: str) -> None:
    text = (API / f"{name}.md").read_text()
    assert text.startswith(f"# kdfast.{name}\n")
    named = re.findall(r"^::: (.+)$", text, re.MULTILINE)
    assert named == list(dict.fromkeys(named)) != []
    assert {entry.split(".")[1] for entry in named} == {name}
    assert f"({name}.md)" in (API / "index.md").read_text()


def test_every_picture_is_shown_and_says_what_it_shows() -> None:
    """For whoever cannot see it, or whose connection is slow."""
    shown = [hit for page in PAGES for hit in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", page.read_text())]
    assert [path for words, path in shown if len(words.split()) < 3] == [], "pictures without alt text"
    pictures = [path.name for path in (ROOT / "docs" / "pages" / "assets").iterdir()]
    names = {Path(path).name for _, path in shown}
    drawn = {".png", ".jpg", ".webp", ".svg"}
    assert [name for name in pictures if Path(name).suffix in drawn and name not in names] == []


@pytest.mark.xdist_group("docs")
def test_documentation_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        ROOT / "docs" / "mkdocs.yml",
    ]
    result = subprocess.run(
        [*map(str, build), "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    quoted = [page.name for page in pages if "<blockquote>\n<blockquote>" in page.read_text()]
    assert quoted == [], "a session at the prompt, taken for quotations: see docs/plain_roles.py"
    remote = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^"']+""")
    assert [(page.name, hit) for page in pages for hit in remote.findall(page.read_text())] == []
    styles = [path.read_text() for path in (tmp_path / "site").rglob("*.css")]
    assert not any(re.search(r"url\(['\"]?https?://|@import", text) for text in styles)
