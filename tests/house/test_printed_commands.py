"""Every command that README and the pages print: the command line itself takes it, whole, up to where work begins."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from kdfast import benchmarks
from kdfast.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
INLINE = re.compile(r"`(kdfast [^`]+)`")
COMMANDS: dict[str, Any] = getattr(get_command(app), "commands")  # noqa: B009 - a click group; typer types it as a command

#: Where a command's work begins: what is put there instead says that the command came so far.
WORK = [
    "demo.run.run",
    "teach.run.run",
    "distill.run.run",
    "distill.run.run_seeds",
    "diffusion_model.run.run",
    "evaluate.run.run",
    "export.run.run",
    "synth.run.run",
    "select.run.run",
    "data_report.run.run",
    "label.run.run",
    "report.run",
]
#: What stands for something of the reader's, by the word before it or alone.
STANDS_FOR = {
    ("--to", "FORMAT"): "onnx",
    ("--recipe", "FILE"): "dmkd/digits",
    ("show", "NAME"): "dmkd/table-2",
    ("--cell", "CELL"): "wrn_40_2-wrn_16_1",
    ("reproduce", "TABLE"): "dmkd/table-2",
    ("kdfast", "COMMAND"): "teach",
    ("keys", "COMMAND"): "distill",
}


def words_of(text: str) -> list[str]:
    """The words after ``kdfast``, of alternatives the first, without what may be left out."""
    text = re.sub(r"\s\[[A-Z]+\]", "", " ".join(text.replace("\\|", "|").split()))
    text = re.sub(r"(?<=\w)\|[\w|]+", "", text.replace("RUN…", "RUN"))
    words = shlex.split(text, comments=True)
    if "kdfast.cli" in words:  # torchrun … -m kdfast.cli
        words = ["kdfast", *words[words.index("kdfast.cli") + 1 :]]
    return [STANDS_FOR.get((words[at - 1], word), word) for at, word in enumerate(words) if at]


def printed() -> list[pytest.ParameterSet]:
    """Every command: lines of shell blocks, which are complete, and what the text mentions, which may not be."""
    found: dict[tuple[str, bool], Any] = {}
    for page in PAGES:
        text = page.read_text()
        for block in FENCE.finditer(text):
            if block["language"] not in ("bash", "sh", "shell", "console"):
                continue
            for line in block["code"].replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if line.startswith("kdfast ") or " kdfast.cli " in line:
                    found.setdefault((line, True), page)
        for mention in INLINE.findall(FENCE.sub("", text)):
            found.setdefault((mention, False), page)
    return [
        pytest.param(text, whole, id=f"{page.name}: {' '.join(text.split())[:60]}")
        for (text, whole), page in found.items()
        if not re.search(r"\.\.\.|(?<!RUN)…", text)
    ]


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The configs that commands were about to work on; nothing works."""
    configs: list[Any] = []

    def instead(*given: Any, **_: Any) -> dict[str, Any]:
        configs.append(given[0])
        return {}

    for place in WORK:
        monkeypatch.setattr(f"kdfast.experiments.{place}", instead)
    for name in ("run", "write", "succeeded"):
        monkeypatch.setattr(benchmarks, name, lambda *given, **_: instead(*given) or [1])
    monkeypatch.setattr(
        "kdfast.experiments.distill.stored.StoredLabels",
        lambda folder: SimpleNamespace(teacher="runs/teacher"),
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-table.yaml").write_text((ROOT / "recipes" / "dmkd" / "table-2.yaml").read_text())
    return configs


def refusal(words: list[str], *, whole: bool) -> str:
    """What is wrong with a command; empty if nothing is."""
    if words[0].startswith("-"):
        return ""
    if words[0] not in COMMANDS:
        return f"no command {words[0]!r}"
    command = COMMANDS[words[0]]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    if unknown := [word for word in words[1:] if word.startswith("--") and word not in known]:
        return f"no option {unknown[0]!r}"
    if suites := [words[at + 1] for at, word in enumerate(words) if word == "--suite"]:
        return "" if set(suites) <= set(benchmarks.SUITES) else f"no suite {suites}"
    if words[0] == "bench" and "--compare" in words:
        return ""  # reads files; tests/walks/kernel.sh has them
    if words[0] == "reproduce" and "--dry-run" not in words:
        words = [*words, "--dry-run"]
    result = CliRunner().invoke(app, words)
    if result.exit_code == 0:
        return ""
    said = " ".join(result.output.split()) or repr(result.exception)
    # A mention need not be complete.
    return "" if not whole and re.search(r"Missing (argument|option)|: missing|give either", said) else said


@pytest.mark.parametrize(("text", "whole"), printed())
def test_every_printed_command_is_taken(text: str, whole: bool, reached: list[Any]) -> None:
    words = words_of(text)
    assert refusal(words, whole=whole) == ""
    runs = {place.partition(".")[0].replace("_", "-") for place in WORK}
    named = {"evaluate": "eval", "diffusion-model": "teach-generator"}
    if whole and words[0] in {named.get(name, name) for name in runs}:
        assert len(reached) == 1, "the command did not come to its work"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("kdfast tech --data digits", "no command 'tech'"),
        ("kdfast teach --dat digits --out x", "no option '--dat'"),
        ("kdfast teach --data digits --out x epoch=3", "did you mean 'epochs'"),
        ("kdfast teach --data digits --out x epochs=many", "epochs: got 'many'"),
        ("kdfast distill --recipe dmkd/table-99 --out x", "no recipe of that name"),
        ("kdfast distill --out x method=kd student=resnet8 data=d", "teacher: missing"),
        ("kdfast synth --source diffusion --out x", "weights: missing"),
        ("kdfast bench --quick --suite loses --out x", "no suite"),
        ("kdfast reproduce dmkd/table-2 --cell wrn --out x", "has no cell 'wrn'"),
        ("kdfast label data/x", "Missing argument 'TEACHER'"),
    ],
)
def test_a_slip_would_be_found(text: str, why: str, reached: list[Any]) -> None:
    assert why in refusal(words_of(text), whole=True)


def test_there_are_commands_of_every_kind() -> None:
    """The collection itself: every command of the app is printed somewhere, and most lines are whole."""
    texts = [(words_of(str(param.values[0])), param.values[1]) for param in printed()]
    assert {words[0] for words, _ in texts} >= set(COMMANDS)
    assert sum(bool(whole) for _, whole in texts) >= 30


def test_extras_and_files_that_pages_name_are_there() -> None:
    """``pip install ".[extra]"``, ``bash FILE``, ``python -m MODULE`` and pytest's files."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wrong, seen = [], 0
    for page in PAGES:
        text = page.read_text()
        for group in re.findall(r"pip install (?:-e )?\"?(?:kdfast|\.)\[([\w,-]+)\]", text):
            wrong += [(page.name, name) for name in group.split(",") if name not in extras]
            seen += 1
        for block in FENCE.finditer(text):
            for line in block["code"].splitlines() if block["language"] == "bash" else ():
                found = re.findall(r"(?:^|\s)((?:tests|bench|docs)/[\w/]+\.(?:py|sh))", line)
                found += [module.replace(".", "/") + ".py" for module in re.findall(r"-m (bench\.\w+)", line)]
                wrong += [(page.name, name) for name in found if not (ROOT / name).is_file()]
                seen += len(found)
    assert wrong == []
    assert seen > 10
