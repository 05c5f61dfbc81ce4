"""Runs as strangers name and edit them: a page, or one of kdfast's errors that names the file."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kdfast.errors import DataError
from kdfast.report.page import write_report
from kdfast.training.metrics import read_metrics
from kdfast.training.progress import Progress

LOG = "".join(
    json.dumps({"kind": kind, "step": step, "loss": 1 / step, "accuracy": 0.5}) + "\n"
    for step in (1, 2, 3)
    for kind in ("train", "eval")
)


def run(folder: Path, metrics: Any = None, log: str = LOG) -> Path:
    folder.mkdir(parents=True)
    known = {"accuracy": 0.5, "class_accuracy": {"$x$_\\nope{1}": 0.5, "[bold]b": 0.1, "c\nd": 0.2}}
    (folder / "metrics.json").write_text(json.dumps(known if metrics is None else metrics))
    (folder / "metrics.jsonl").write_text(log)
    return folder


@pytest.mark.parametrize(
    "name", ["$x", "a$b$c", "x_$\\nope{1}$_y", "[bold]a[/nope]", "two\nlines", "<b>&amp;", "%s {0}", "\udcff"]
)
def test_a_page_of_any_name(tmp_path: Path, name: str) -> None:
    folders = [run(tmp_path / os.fsencode(name).decode(errors="surrogateescape")), run(tmp_path / "plain")]
    page = write_report(folders, tmp_path / "report.html").read_text()
    assert "<b>&amp;" not in page
    if name.startswith(("$", "a$", "x_")):
        assert name in page


@pytest.mark.parametrize(
    "metrics",
    [
        {"accuracy": "x"},
        {"accuracy": None},
        {"class_accuracy": [1]},
        {"class_accuracy": 3},
        {"class_accuracy": {"a": "x"}},
        {"settings": [1], "images": "x"},
        {"seconds_by_phase": 3},
        {"captions": 3},
        {"capacity": "x", "accuracy": 0.1},
        {"nfe": [], "accuracy": 0.1},
        {
            "teacher_accuracy": "x",
            "student_accuracy": [],
            "student_hard_label_accuracy": 1,
            "student_noise_accuracy": 1,
        },
        [1],
        3,
    ],
    ids=str,
)
def test_a_wrong_metric_is_drawn_or_named(tmp_path: Path, metrics: Any) -> None:
    folders = [run(tmp_path / "a", metrics), run(tmp_path / "b")]
    try:
        write_report(folders)
    except DataError as error:
        assert str(tmp_path / "a") in str(error)  # noqa: PT017 — most of these can be drawn


@pytest.mark.parametrize(
    "log, message",
    [
        ("3\n" + LOG, "line 1: holds 3, accepted: an object"),
        ("[" * 100_000 + "\n" + LOG, "line 1 is not JSON: is nested too deep"),
        ("x\n" + LOG, "line 1 is not JSON"),
        ('{"a": 1, "a": 2}\n' + LOG, "line 1 is not JSON: .*twice"),
    ],
    ids=["number", "deep", "words", "twice"],
)
def test_a_wrong_line_of_a_log_is_named(tmp_path: Path, log: str, message: str) -> None:
    folder = run(tmp_path / "a", log=log)
    with pytest.raises(DataError, match=message):
        write_report([folder])
    with pytest.raises(DataError, match=message):
        read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("a: &a8 [&a7 [&a6 [x, x], *a6, *a6], *a7, *a7]\n", "an anchor or alias"),
        ("a: " + "[" * 3000, "nested too deep"),
        ("a: !!int ''\n", "line 1"),
        ("lr: 1\nlr: 2\n", "lr"),
        ("x" * 200_000, "accepted: at most"),
        ("x" * 2_000_000, "accepted: at most"),
    ],
    ids=["aliases", "deep", "empty", "twice", "long", "longer"],
)
def test_a_recipe_that_is_a_trap_is_named(tmp_path: Path, recipe: str, message: str) -> None:
    folder = run(tmp_path / "a")
    (folder / "recipe.yaml").write_text(recipe)
    with pytest.raises(DataError, match=rf"recipe\.yaml: .*{message}"):
        write_report([folder])


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.json"])
def test_a_pipe_is_no_record(tmp_path: Path, name: str) -> None:
    folder = run(tmp_path / "a")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match=f"{name}: cannot be read: is a pipe"):
        write_report([folder])


def test_a_pipe_is_no_log(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(DataError, match="is a pipe"):
        write_report([folder])


def test_markup_in_what_a_bar_says_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.console

    out = io.StringIO()
    real = rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda **_: real(file=out, force_terminal=True, width=100))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(enabled=True) as progress:
        progress.task("[/nope] [red]run", 3).advance(3)
    assert "[/nope] [red]run" in out.getvalue()
