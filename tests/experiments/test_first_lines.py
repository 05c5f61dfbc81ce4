"""What a run says (data and networks, epochs, a table at the end) and leaves: best and last weights, its recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.data import load_dataset
from kdfast.errors import CheckpointError
from kdfast.experiments.common.held_out import Evaluator
from kdfast.experiments.distill.run import parse
from kdfast.experiments.distill.run import run as distill
from kdfast.experiments.teach.config import TeachConfig
from kdfast.experiments.teach.run import run as teach
from kdfast.training import load_model, load_model_config
from kdfast.training.provenance import _commit
from kdfast.version import __version__
from tests.data.test_splits import classes_of

SHORT: dict[str, Any] = {"batch_size": 16, "tensorboard": False, "lr": 0.01}


def teach_config(data: Path, **values: Any) -> TeachConfig:
    return TeachConfig(**{"data": str(data), "model": "resnet8", "image_size": 8, **SHORT, **values})


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A folder to train on, one to test on, and a run of three epochs."""
    root = tmp_path_factory.mktemp("first")
    train, test = classes_of(root / "here", 16), classes_of(root / "there", 8)
    teach(teach_config(train, test_data=str(test), epochs=3), root / "teacher", progress=False)
    return train, test, root / "teacher"


def test_a_run_says_what_it_trains_on_and_how_it_ended(
    taught: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test, teacher = taught
    values = {
        "method": "kd",
        "teacher": str(teacher),
        "student": "resnet8",
        "data": str(train),
        "image_size": 8,
    }
    config, method = parse({**values, **SHORT, "test_data": str(test), "epochs": 2})
    metrics = distill(config, method, tmp_path / "a run")
    said = capsys.readouterr().err
    assert f"\nnext      kdfast export '{tmp_path}/a run' --to torch.export\n" in said, (
        "not a line that runs as it is"
    )
    lines = {line.split()[0]: line for line in reversed(said.splitlines()) if line[:1].strip()}
    assert lines["data"] == f"data      {train}, 32 images, 2 classes of 16"
    assert lines["test"] == f"test      {test}, 16 images, 2 classes of 8"
    assert "0.0775 M parameters, accuracy" in lines["teacher"]
    assert "2 epochs × 2 = 4 steps, batch 16, sgd, lr 0.01 constant, cpu, fp32" in lines["training"]
    assert re.search(r"^epoch 1/2 · loss [\d.]+ · accuracy [\d.]+ %", said, re.MULTILINE)
    assert re.search(r"^epoch 2/2 · loss", said, re.MULTILINE)
    assert re.search(
        r"^student   resnet8 .*0.0775 M parameters  accuracy [\d.]+ %, [\d.]+ % of the", said, re.MULTILINE
    )
    assert f"{tmp_path / 'a run' / 'model.safetensors'}  (last epoch)" in said
    assert said.index("teacher   ") < said.index("epoch 1/2")
    kept = json.loads((tmp_path / "a run" / "metrics.json").read_text())
    assert kept == metrics
    assert metrics["share_kept"] == pytest.approx(metrics["accuracy"] / metrics["teacher_accuracy"])
    assert (
        metrics["parameters"]
        == metrics["teacher_parameters"]
        == sum(value.numel() for value in load_model(teacher).parameters())
    )


def test_the_teacher_is_measured_at_its_own_size(taught: tuple[Path, Path, Path], tmp_path: Path) -> None:
    train, test, teacher = taught
    values = {
        "method": "kd",
        "teacher": str(teacher),
        "student": "resnet8",
        "data": str(train),
        "image_size": 16,
    }
    config, method = parse({**values, **SHORT, "test_data": str(test), "epochs": 1})
    metrics = distill(config, method, tmp_path / "run", progress=False)
    own = load_model_config(teacher)
    evaluator = Evaluator(load_dataset(test, "all", image_size=8), own, batch_size=8, trainer_rank=(0, 1))
    assert metrics["teacher_accuracy"] == evaluator(load_model(teacher))["accuracy"]


def test_shrunk_images_and_held_out_parts_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = classes_of(tmp_path / "set", 10)
    loss = teach(teach_config(data, image_size=4), tmp_path / "run", dry_run=True)["loss"]
    said = capsys.readouterr().err
    assert "sides of 8 pixels shrunk to 4×4; image_size=8 keeps them larger" in said
    assert f"{data} has no split folders or tables: train is 16 of its 20 images" in said
    assert f"one optimiser step on a real batch: loss {loss:.4g}" in said
    assert "nothing was written" in said
    assert not (tmp_path / "run").exists()
    teach(teach_config(data, image_size=4), tmp_path / "run", dry_run=True, progress=False)
    teach(teach_config(data, image_size=4), tmp_path / "run", dry_run=True, talk=False)
    assert capsys.readouterr().err == ""


def test_best_and_last_weights_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.25, 0.75, 0.5])
    seen: list[dict[str, torch.Tensor]] = []

    def measure(self: Evaluator, network: torch.nn.Module) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return {"accuracy": next(scores)}

    monkeypatch.setattr(Evaluator, "__call__", measure)
    data = classes_of(tmp_path / "set", 10)
    metrics = teach(teach_config(data, epochs=3), tmp_path / "run", progress=False)
    assert (metrics["accuracy"], metrics["best_accuracy"], metrics["best_epoch"]) == (0.5, 0.75, 2)
    for file, expected in (("best", seen[1]), ("model", seen[2])):
        state = load_model(tmp_path / "run" / f"{file}.safetensors").state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert any(not torch.equal(seen[1][name], seen[2][name]) for name in seen[1])


@pytest.mark.parametrize("changed", [{"lr": 0.003}, {"epochs": 4}, {"seed": 1, "keep": 5}])
def test_a_refused_resumption_leaves_the_recipe_alone(tmp_path: Path, changed: dict[str, Any]) -> None:
    data = classes_of(tmp_path / "set", 10)
    teach(teach_config(data, epochs=1), tmp_path / "run", progress=False)
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        teach(teach_config(data, **{"epochs": 1, **changed}), tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before
    again = teach(teach_config(data, epochs=1), tmp_path / "run", resume=True, progress=False)
    assert again["steps"] == 1


def test_a_run_says_what_made_it(taught: tuple[Path, Path, Path], tmp_path: Path) -> None:
    made = json.loads((taught[2] / "provenance.json").read_text())
    assert made["kdfast"] == __version__
    assert made["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", made["date"])
    assert made["device"].startswith("cpu, ")
    # Of a checkout its commit; of an installed package there is none.
    assert re.fullmatch(r"[0-9a-f]{12}\+?", made.get("commit", "0" * 12))
    assert _commit(tmp_path) == ""
