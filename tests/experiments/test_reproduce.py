"""``kdfast reproduce``: what is run in which order, what is found, what is gone on with, and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kdfast.cli.app import app
from kdfast.errors import ConfigError, KDFastError
from kdfast.experiments.reproduce.config import ReproduceConfig
from kdfast.experiments.reproduce.run import run
from tests.conftest import INTERPRETING

TABLE = """
title: a small table
source: A paper, Table 3
notes: [it contradicts itself]
ours: {lr: not in the paper}
common: {method: dmkd, student: resnet8, test_data: digits, lr: 0.1}
cells:
  one: {teacher: runs/t-resnet8, data: data/x, paper: 50.5}
  two: {teacher: runs/t-resnet14, data: data/x, paper: 60}
teacher:
  runs/t-{model}: kdfast teach --data digits --model {model} --out runs/t-{model} epochs=2
data:
  data/x: kdfast select data/y runs/t-resnet8 --out data/x --budget 10
  data/y: kdfast synth --source noise --out data/y images=20
miniature:
  {note: digits, common: {epochs: 1}, teacher: {"runs/t-{model}": "python -c pass"}, data: {data/x: "python -c pass"}}
"""


class Fake:
    """Runs nothing; leaves what a command would, and remembers it."""

    def __init__(self, accuracy: float = 0.52, fails: str = "") -> None:
        self.words: list[list[str]] = []
        self.accuracy, self.fails = accuracy, fails

    def __call__(self, words: Sequence[str]) -> int:
        self.words.append(list(words))
        out = Path(words[list(words).index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        if self.fails and self.fails in str(out):
            (out / "checkpoints").mkdir(exist_ok=True)
            return 1
        metrics = {"accuracy": self.accuracy, "seed": 0, "seconds": 3.0}
        (out / "metrics.json").write_text(json.dumps(metrics))
        return 0


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(TABLE)
    return tmp_path / "t.yaml"


def config(table: Path, **more: Any) -> ReproduceConfig:
    return ReproduceConfig(**{"table": str(table), "out": "out", "progress": False, **more})


def test_everything_is_made_in_order_and_set_beside_the_paper(table: Path) -> None:
    fake = Fake()
    result = run(config(table), fake)
    assert [" ".join(words) for words in fake.words] == [
        "teach --data digits --model resnet8 --out out/runs/t-resnet8 epochs=2",
        "synth --source noise --out out/data/y images=20",
        "select out/data/y out/runs/t-resnet8 --out out/data/x --budget 10",
        "teach --data digits --model resnet14 --out out/runs/t-resnet14 epochs=2",
        "distill --recipe out/cells/one.yaml --out out/cells/one",
        "distill --recipe out/cells/two.yaml --out out/cells/two",
    ]
    assert "teacher: out/runs/t-resnet8" in Path("out/cells/one.yaml").read_text()
    assert result["results"]["one"]["difference"] == {"accuracy": 1.5}
    assert result["results"]["two"]["ours"] == {"accuracy": 52.0}
    page = Path(result["report"]).read_text()
    for text in (
        "50.50",
        "+1.50",
        "-8.00",
        "not in the paper",
        "it contradicts itself",
        "2 of 2",
        "one seed each",
    ):
        assert text in page, text
    assert json.loads(Path("out/reproduce.json").read_text())["cells"]["one"]["seeds"] == [0]
    again = Fake()
    assert run(config(table), again)["cells"] == "2 of 2"
    assert again.words == []


def test_it_goes_on_where_a_command_failed(table: Path) -> None:
    with pytest.raises(KDFastError, match=r"cells/two .*status 1; what was finished stays"):
        run(config(table), Fake(fails="cells/two"))
    assert json.loads(Path("out/reproduce.json").read_text())["cells"].keys() == {"one"}
    stale = Path("out/cells/.tmp-1-abc-two.yaml")  # of a writer that was killed
    stale.touch()
    left = Fake()
    run(config(table), left)
    assert not stale.exists()
    assert left.words == [["distill", "--recipe", "out/cells/two.yaml", "--out", "out/cells/two", "--resume"]]


def test_what_is_there_is_used_and_its_differences_are_said(table: Path) -> None:
    found = Path("runs/t-resnet8")
    found.mkdir(parents=True)
    (found / "metrics.json").write_text('{"accuracy": 0.9}')
    (found / "recipe.yaml").write_text("epochs: 7\nmodel: resnet8")
    fake = Fake()
    result = run(config(table, cells=("one",), overrides={"lr": 0.3}), fake)
    assert [words[0] for words in fake.words] == ["synth", "select", "distill"]
    assert "runs/t-resnet8" in fake.words[1]
    page = Path(result["report"]).read_text()
    assert "runs/t-resnet8: epochs 7, not 2" in page
    assert "lr: 0.3, set on the command line" in page
    assert "90.00 %" in page


def test_several_seeds_are_one_number_with_a_spread(table: Path) -> None:
    def several(words: Sequence[str]) -> int:
        status = Fake()(words)
        if words[0] == "distill":
            assert words[-2:] == ["--seeds", "3"]
            summary = {"seeds": [0, 1, 2], "accuracy": [0.5], "accuracy_mean": 0.51, "accuracy_std": 0.01}
            (Path(words[4]) / "metrics.json").write_text(json.dumps(summary))
        return status

    result = run(config(table, cells=("one",), seeds=3), several)
    assert result["results"]["one"]["std"] == {"accuracy": 1.0}
    assert "51.00 ± 1.00" in Path(result["report"]).read_text()


def test_a_miniature_says_so(table: Path) -> None:
    result = run(config(table, scale="small", cells=("one",)), Fake())
    page = Path(result["report"]).read_text()
    assert "This is a miniature, not the paper&#39;s experiment" in page
    assert "resnet8 from t-resnet8" in page
    assert "difference" not in page
    assert result["results"]["one"]["difference"] == {}
    assert "epochs: 1" in Path("out/cells/one.yaml").read_text()


def test_what_has_to_be_brought_is_said_at_once(table: Path) -> None:
    table.write_text(
        TABLE.replace("kdfast synth --source noise --out data/y images=20", '{bring: "pictures of y"}')
    )
    with pytest.raises(ConfigError, match=r"put these in place first: data/y \(pictures of y\)"):
        run(config(table), Fake())
    dry = run(config(table, dry_run=True), Fake())
    assert dry["missing"] == ["data/y: pictures of y"]
    assert not Path("out").exists()


def test_other_values_in_the_same_place_are_refused(table: Path) -> None:
    run(config(table, cells=("one",)), Fake())
    with pytest.raises(ConfigError, match="holds cell one with other values"):
        run(config(table, cells=("one",), overrides={"lr": 0.7}), Fake())
    with pytest.raises(ConfigError, match="has no cell 'on'; did you mean one"):
        run(config(table, cells=("on",)), Fake())


def test_an_interrupted_command_interrupts_all(table: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(config(table), lambda words: 130)


def command(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_the_commands_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "dmkd/table-2" in command("recipes").stdout
    assert "kdiffusion" not in command("recipes", "dmkd").stdout
    shown = command("recipes", "show", "dmkd/table-2", "--cell", "wrn_40_2-wrn_16_1")
    assert "student: wrn_16_1" in shown.stdout
    assert json.loads(command("recipes", "--json").stdout)[0]["name"]
    assert command("recipes", "show").exit_code == 2
    assert command("recipes", "dmkd", "--cell", "x").exit_code == 2
    assert command("reproduce", "dmkd/tabel-2", "--out", "o").exit_code == 2
    assert command("reproduce", "dmkd/table-2", "--scale", "small", "--out", "o").exit_code == 2
    dry = command("reproduce", "dmkd/table-2", "--out", "o", "--cell", "vgg11-resnet18", "--dry-run")
    assert dry.exit_code == 0
    assert "# bring" not in dry.stdout
    assert dry.stdout.count("kdfast ") == 3
    wrong = command("distill", "--recipe", "dmkd/table-2", "--out", "o")
    assert wrong.exit_code == 2
    assert "name one with --cell" in wrong.stderr


@pytest.mark.skipif(INTERPRETING, reason="trains networks")
def test_the_executor_runs_commands_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher and a student, by the real commands."""
    monkeypatch.chdir(tmp_path)
    quick = "image_size=8 epochs=1 batch_size=256 device=cpu tensorboard=false"
    Path("t.yaml").write_text(
        "title: t\nsource: s\ncommon: {method: kd, student: gap2, data: digits, test_data: digits, epochs: 1}\n"
        "cells: {a: {teacher: runs/t, paper: 10}}\n"
        f"teacher: {{runs/t: kdfast teach --data digits --model gap2 --out runs/t {quick}}}\n"
    )
    result = command("reproduce", "t.yaml", "--out", "out", "-q", "--json", "device=cpu", "tensorboard=false")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["cells"] == "1 of 1"
    assert 0 < found["results"]["a"]["ours"]["accuracy"] <= 100


MINIATURES: dict[str, tuple[str, ...]] = {
    "dmkd/table-10": ("resnet18-resnet18-soft", "resnet18-resnet18-hard"),
    "surrogate/table-5": ("original-none", "shaders-standard-mixup"),
    "ssdkd/table-4": ("cifar10-resnet34-resnet18-base", "cifar10-resnet34-resnet18-phi"),
    "diffkd/table-7": ("logits", "both"),
    "kdiffusion/table-6": ("resnet32x4-shufflenet_v1-m2", "resnet32x4-shufflenet_v1-m8"),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(INTERPRETING, reason="trains networks")
@pytest.mark.parametrize("name", MINIATURES)
def test_a_table_of_each_paper_in_miniature(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cells each: they train, they learn, and the page says that it is a miniature. Chance is 10 %."""
    monkeypatch.chdir(tmp_path)
    chosen = [word for cell in MINIATURES[name] for word in ("--cell", cell)]
    result = command("reproduce", name, "--scale", "small", "--out", "out", "-q", *chosen)
    assert result.exit_code == 0, result.stderr
    cells = json.loads(Path("out/reproduce.json").read_text())["cells"]
    assert sorted(cells) == sorted(MINIATURES[name])
    print(name, {cell: found["ours"]["accuracy"] for cell, found in cells.items()})
    assert all(found["ours"]["accuracy"] > 20 for found in cells.values())
    assert "This is a miniature" in Path("out/report.html").read_text()


def test_a_damaged_metric_of_a_cell_is_named(table: Path) -> None:
    run(config(table), Fake())
    for text in ("[" * 100_000, "3", '{"accuracy": 1, "accuracy": 2}'):
        Path("out/cells/one/metrics.json").write_text(text)
        with pytest.raises(KDFastError, match=r"cells/one/metrics\.json: (is nested|holds|cannot be read)"):
            run(config(table), Fake())
