"""Several runs on one page: spread beside means, recipes, tables of two settings, and none of it in a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdfast.errors import DataError
from kdfast.experiments.report import run as report
from kdfast.report.compare import cell, differing, facts, pivots, results
from kdfast.report.runs import Run, read_run


def made(name: str, metrics: dict[str, Any], **recipe: Any) -> Run:
    return Run(Path(name), name, metrics, (), (), recipe)


GRID = [
    made(f"{t}-{s}", {"accuracy": value, "seed": 0}, teacher=t, student=s, lr=0.1, seed=number, device="cpu")
    for number, (t, s, value) in enumerate(
        [("r34", "r18", 0.5417), ("r34", "r34", 0.6019), ("r18", "r18", 0.5722), ("r18", "r34", 0.6111)]
    )
]


def test_means_have_their_spread_in_the_same_cell() -> None:
    run = made("a", {"accuracy": [0.5, 0.6], "accuracy_mean": 0.55, "accuracy_std": 0.0707, "seeds": [0, 1]})
    assert cell(run, "accuracy") == "55.00 ± 7.07 %"
    head, rows = results([run, made("b", {"accuracy": 0.25, "steps": 1200})], ["a", "b"])
    assert head == ("run", "accuracy", "steps")
    assert rows == (("a", "55.00 ± 7.07 %", "–"), ("b", "25.00 %", "1,200"))
    assert cell(made("c", {"share_kept": 0.987}), "share_kept") == "98.70 %"


def test_a_table_of_the_two_settings_that_differ() -> None:
    (grid,) = pivots(GRID)
    assert grid.title == "Accuracy by teacher and student"
    assert grid.head == ("teacher \\ student", "r18", "r34")
    assert grid.rows == (("r34", "54.17 %", "60.19 %"), ("r18", "57.22 %", "61.11 %"))
    assert pivots(GRID[:2]) == []  # one teacher
    third = made("x", {"accuracy": 0.1}, teacher="r34", student="r18", lr=0.2)
    assert pivots([*GRID, third]) == []  # three keys differ
    numbers = [
        made(str(m), {"accuracy": m / 100}, branches=m, student=s) for m in (16, 2) for s in ("a", "b")
    ]
    assert pivots(numbers)[0].head == ("student \\ branches", "2", "16")


def test_what_each_run_was_told() -> None:
    head, rows = facts(GRID, [run.name for run in GRID])
    assert head == ("run", "teacher", "student", "lr", "seed")
    assert rows[0] == ("r34-r18", "r34", "r18", "0.1", "0")
    assert differing([{"seed": 1, "a": 1}, {"seed": 2, "a": 1}]) == []
    assert facts([made("a", {})], ["a"]) == ((), ())


def test_what_made_each_run() -> None:
    """Releases, commit and date stand in columns of their own; a run of before there was a record has dashes."""
    record = {
        "kdfast": "0.1.0",
        "commit": "abc123+",
        "torch": "2.13.0",
        "date": "2026-01-02T03:04:05Z",
        "x": 1,
    }
    one = Run(Path("a"), "a", {}, (), (), {"method": "kd"}, record)
    seeds = Run(Path("b"), "b", {}, (), (Run(Path("c"), "c", {}, (), (), {"method": "kd"}, record),))
    head, rows = facts([one, seeds, made("old", {}, method="kd")], ["a", "b", "old"])
    assert head == ("run", "method", "kdfast", "commit", "torch", "date")
    assert rows[0][1:] == rows[1][1:] == ("kd", "0.1.0", "abc123+", "2.13.0", "2026-01-02T03:04:05Z")
    assert rows[2] == ("old", "kd", "–", "–", "–", "–")


def test_the_page_of_several_is_in_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 0.5), ("b", 0.75)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"accuracy": value}))
        (tmp_path / name / "recipe.yaml").write_text(f"student: net-{name}\nlr: 0.1\n")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert report(["a", "b"], tmp_path / "page")[0] == tmp_path / "page" / "report.html"
    text = (tmp_path / "page" / "report.html").read_text()
    assert "75.00 %" in text
    assert "net-b" in text
    assert report(["a", "b"])[0] == Path("report/report.html")
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert left == {"metrics.json", "recipe.yaml"}, before
    assert report(["a"])[0] == Path("a/report.html")
    (tmp_path / "a" / "recipe.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"recipe\.yaml: is not YAML"):
        read_run("a")
