"""What several runs say together: the paper's plots and tables, from metrics files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdfast.data import ShardWriter
from kdfast.experiments.common.recipe import build_config
from kdfast.experiments.common.synthetic_set import ProbabilityVariance, describe
from kdfast.experiments.distill import run as distill
from kdfast.experiments.evaluate import run as evaluate
from kdfast.methods.dmkd import DMKDConfig
from kdfast.models import create_model
from kdfast.report import read_run, write_report
from kdfast.report.studies import studies
from kdfast.training.model_io import ModelConfig, save_model
from tests.support.shards import pictures

SETTINGS = {"temperature": 10.0, "labels": "soft", "images": 2000, "guidance_scale": 2.0, "steps": 25}


def student(folder: Path, accuracy: float, spread: float = 0.0, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    chosen = {**SETTINGS, **settings}
    if not spread:
        (folder / "metrics.json").write_text(json.dumps({"accuracy": accuracy, "settings": chosen}))
        return folder
    summary = {"accuracy_mean": accuracy, "accuracy_std": spread, "seeds": [0, 1]}
    (folder / "metrics.json").write_text(json.dumps(summary))
    for seed in (0, 1):
        student(folder / f"seed-{seed}", accuracy, seed=seed, **settings)
    return folder


def titles(folders: list[Path]) -> tuple[list[str], list[Any]]:
    plots, grids = studies([read_run(folder) for folder in folders])
    return [plot.title for plot in plots], grids


def test_accuracy_over_guidance_and_steps_is_table_six(tmp_path: Path) -> None:
    cells = {(s, t): 0.5 + s / 100 + t / 1000 for s in (1.0, 2.0) for t in (25, 50)}
    folders = [
        student(tmp_path / f"{s}-{t}", value, 0.01 if (s, t) == (2.0, 50) else 0.0, guidance_scale=s, steps=t)
        for (s, t), value in cells.items()
    ]
    found, [grid] = titles(folders)
    assert found == ["Student accuracy over guidance scale s", "Student accuracy over denoising steps T"]
    assert grid.head == ("s", "T = 25", "T = 50")
    assert grid.rows == (("1", "53.50", "56.00"), ("2", "54.50", "57.00 ± 1.00"))


def test_each_choice_of_the_rest_has_a_table_of_its_own(tmp_path: Path) -> None:
    folders = [
        student(tmp_path / f"{teacher}-{s}-{t}", 0.5, guidance_scale=s, steps=t, teacher=teacher)
        for teacher in ("weak", "strong")
        for s in (1.0, 2.0)
        for t in (25, 50)
    ]
    extra = student(tmp_path / "extra", 0.5, images=9)  # must not keep the others from their tables
    _, grids = titles([*folders, extra])
    assert [grid.title.partition(", ")[2] for grid in grids] == ["teacher weak", "teacher strong"]


@pytest.mark.parametrize(
    ("key", "values", "title"),
    [
        ("images", (500, 1000, 4000), "Student accuracy over synthetic images"),
        ("temperature", (1.0, 10.0), "Student accuracy over temperature τ"),
    ],
)
def test_accuracy_over_amount_and_temperature(
    tmp_path: Path, key: str, values: tuple[Any, ...], title: str
) -> None:
    found, grids = titles([student(tmp_path / str(v), 0.9, **{key: v}) for v in values])
    assert found == [title]
    assert grids == []


def test_lines_are_told_apart_by_what_differs_between_them(tmp_path: Path) -> None:
    folders = [
        student(tmp_path / f"{teacher}-{s}", 0.5 + s / 10, guidance_scale=s, teacher=teacher)
        for teacher in ("weak", "strong")
        for s in (1.0, 2.0)
    ]
    plots, _ = studies([read_run(folder) for folder in folders])
    assert "teacher strong" in plots[0].svg
    assert "teacher weak" in plots[0].svg
    assert "labels" not in plots[0].svg


def test_runs_that_differ_in_nothing_or_know_nothing_draw_nothing(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "metrics.json").write_text('{"accuracy": 0.5}')
    assert titles([student(tmp_path / "a", 0.5), student(tmp_path / "b", 0.6), tmp_path / "plain"]) == (
        [],
        [],
    )


def test_variance_accuracy_on_the_set_and_scores_are_drawn(tmp_path: Path) -> None:
    folders = []
    for s in (2.0, 4.0):
        for name, metrics in (
            ("judged", {"accuracy": 0.8, "probability_variance": 6.8e-4 + s * 1e-5, "images": 10}),
            ("set", {"score": -0.3 + s / 10, "images": 10}),
        ):
            folder = tmp_path / f"{name}-{s}"
            folder.mkdir()
            (folder / "metrics.json").write_text(
                json.dumps({**metrics, "settings": {"guidance_scale": s, "steps": 100}})
            )
            folders.append(folder)
    found, _ = titles(folders)
    assert found == [
        "Accuracy on the synthetic set over guidance scale s",
        "Variance of class probabilities over guidance scale s",
        "Score of the images over guidance scale s",
    ]
    page = write_report(folders, tmp_path / "page.html").read_text()
    assert "Across runs" in page
    assert (tmp_path / "plots" / "02-variance-of-class-probabilities-over-guidance-scale-s.svg").exists()


def test_probability_variance_is_what_it_says() -> None:
    logits = torch.randn(7, 5, dtype=torch.float64)
    variance = ProbabilityVariance()
    variance.update(logits[:3])
    variance.update(logits[3:])
    p = logits.softmax(1)
    wanted = ((p - 0.2) ** 2).mean(1).mean()
    assert variance.compute() == pytest.approx(float(wanted))
    sharp = ProbabilityVariance()
    sharp.update(torch.eye(10) * 1e4)
    assert sharp.compute() == pytest.approx(9 / 100)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    metadata = {"guidance_scale": 3.0, "num_inference_steps": 40}
    with ShardWriter(tmp_path / "shards", num_classes=4, metadata=metadata) as writer:
        writer.write(pictures(24, 8), torch.arange(24) % 4)
    return tmp_path / "shards"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network: nn.Module = create_model("resnet8", 4)
    save_model(tmp_path / "teacher", network, ModelConfig("resnet8", 4, 8, (0.5,) * 3, (0.5,) * 3))
    return tmp_path / "teacher"


def test_eval_on_shards_says_how_sharp_the_teacher_is(shards: Path, teacher: Path, tmp_path: Path) -> None:
    config = evaluate.EvalConfig(
        str(teacher), str(shards), loader="torch", out=str(tmp_path / "judged"), device="cpu"
    )
    result = evaluate.run(config, progress=False)
    assert result["settings"] == {"images": 24, "guidance_scale": 3.0, "steps": 40, "network": str(teacher)}
    assert 0 < result["probability_variance"] < 3 / 16
    assert json.loads((tmp_path / "judged" / "metrics.json").read_text()) == result


def test_distilling_remembers_what_it_was_given(shards: Path, teacher: Path, tmp_path: Path) -> None:
    values = {
        "teacher": str(teacher),
        "student": "resnet8",
        "data": str(shards),
        "epochs": 1,
        "loader": "torch",
    }
    config = build_config(distill.DistillConfig, {**values, "tensorboard": False, "device": "cpu"}, source="")
    method = DMKDConfig(temperature=4.0, cutmix_alpha=None)
    distill.run(config, method, tmp_path / "run", progress=False)
    settings = json.loads((tmp_path / "run" / "metrics.json").read_text())["settings"]
    assert settings["temperature"] == 4.0
    assert (settings["guidance_scale"], settings["steps"], settings["images"]) == (3.0, 40, 24)
    assert (settings["student"], settings["teacher"]) == ("resnet8", str(teacher))


def test_what_is_no_synthetic_set_has_no_settings(tmp_path: Path) -> None:
    assert describe(None) == describe("digits") == describe(str(tmp_path)) == {}
