"""SSD-KD from a recipe: every shipped one, a run with its record, its interruption and its report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import kdfast
from kdfast.cli.app import app
from kdfast.data import ShardLoader
from kdfast.errors import CheckpointError, ConfigError, DataError, KDFastError, ShardError
from kdfast.experiments.common.recipe import load_recipe
from kdfast.experiments.distill import run as distill
from kdfast.experiments.distill.data import some_of
from kdfast.experiments.distill.methods.ssdkd import PICTURE, PhaseClock, class_rows
from kdfast.methods import DMKDConfig, SSDKDConfig
from kdfast.models import create_model
from kdfast.report import write_report
from kdfast.training import ModelConfig, TrainingInterrupted, read_metrics, save_model
from kdfast.training.checkpoint import load_checkpoint, save_checkpoint
from tests.support.recipes import Cell, cells, parameters

RECIPES = cells("ssdkd")

#: What makes any recipe a matter of milliseconds; only what it sets at all is replaced.
SMALL: dict[str, Any] = {
    "capacity": 24,
    "fill_epochs": 2,
    "inversion_steps": 2,
    "kd_steps": 2,
    "data_images": 40,
    "synthesis_batch": 8,
    "upsamplings": 2,
    "batch_size": 8,
    "image_size": 32,
    "test_data": None,
    "label_column": None,
}
ALWAYS = {"latent": 8, "generator_width": 4, "synthesis_batch": 8, "device": "cpu", "tensorboard": False}


def save(folder: Path, name: str, size: int, classes: int = 10) -> str:
    torch.manual_seed(0)
    network = create_model(name, classes)
    with torch.no_grad():  # fresh weights predict one class for everything
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias.normal_(std=0.5)
        for parameter in list(network.parameters())[-2:]:
            parameter.normal_(std=0.5)
    save_model(folder, network, ModelConfig(name, classes, size, (0.3,) * 3, (0.3,) * 3))
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("teacher"), "resnet8", 8)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("segmenter"), "deeplabv3_mobilenet_v2", 32, 3)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> str:
    from PIL import Image

    folder = tmp_path_factory.mktemp("masked")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 2)):
        for kind, shape, high in (("images", (32, 32, 3), 256), ("masks", (32, 32), 3)):
            (folder / part / kind).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, high, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / kind / f"{number}.png")
    return str(folder)


def shrunk(cell: Cell) -> dict[str, Any]:
    values = cell.values
    small = values | {key: value for key, value in SMALL.items() if key in values}
    if values["method"] == "ssdkd":
        small |= ALWAYS
    small |= {"student": "resnet8", "epochs": 1, "milestones": [], "schedule": "constant", "min_lr": 0.0}
    return small


def distinct() -> list[Any]:
    """One recipe of each kind: pairs of networks, data sets and sizes are all alike once shrunk."""
    kinds: dict[str, Cell] = {}
    for cell in RECIPES:
        values = {
            key: value
            for key, value in shrunk(cell).items()
            if key not in ("teacher", "data", "adv", "oh", "lr_z", "lr_g")
        }
        kinds.setdefault(json.dumps(values, sort_keys=True), cell)
    return parameters(list(kinds.values()))


def test_there_is_a_recipe_for_each_cell() -> None:
    names = {cell.stem for cell in RECIPES}
    pairs = (
        "resnet34-resnet18",
        "vgg11-resnet18",
        "wrn_40_2-wrn_16_1",
        "wrn_40_2-wrn_40_1",
        "wrn_40_2-wrn_16_2",
    )
    tables = ("", "-fast2", "-relaxed", "-fast5", "-fast10", "-deepinversion", "-dafl", "-dfq")
    wanted = {f"{data}-{pair}{row}" for data in ("cifar10", "cifar100") for pair in pairs for row in tables}
    rows = ("-base", "-ps", "-difficulty", "-diversity", "-phi")
    wanted |= {f"{d}-{p}{r}" for d in ("cifar10", "cifar100") for p in (pairs[0], pairs[2]) for r in rows}
    wanted |= {f"{d}-{p}-{n}" for d in ("cifar10", "cifar100") for p in pairs[:3] for n in (500, 2500, 10000)}
    wanted |= {f"cifar10-{p}-{r}" for p in pairs[:3] for r in ("real", "deepinversion-5000")}
    wanted |= {
        "nyuv2-deeplabv3",
        "nyuv2-deeplabv3-fast10",
        "nyuv2-deeplabv3-dafl",
        "nyuv2-deeplabv3-real",
        "digits",
    }
    assert names == wanted


@pytest.mark.parametrize("cell", parameters(RECIPES))
def test_every_recipe_is_valid_and_its_networks_exist(cell: Cell) -> None:
    config, method = distill.parse(cell.values, source=cell.stem)
    assert isinstance(method, SSDKDConfig if config.method == "ssdkd" else DMKDConfig)
    with torch.device("meta"):  # no weights
        create_model(config.student, 10, **config.model_options())
        create_model(Path(config.teacher).name.split("-")[1].replace("teacher", "resnet8"), 10)


def test_the_papers_and_the_predecessors_numbers() -> None:
    config, method = distill.parse(load_recipe("ssdkd/cifar100-resnet34-resnet18"))
    assert (config.epochs, config.batch_size, config.lr, config.min_lr) == (200, 256, 0.2, 2e-4)
    assert (config.momentum, config.weight_decay, config.schedule) == (0.9, 1e-4, "cosine")
    assert (method.capacity, method.fill_epochs, method.temperature) == (5000, 20, 20)
    assert (method.bn, method.adv, method.oh) == (10, 1.33, 0.5)
    assert (method.inversion_steps, method.lr_z, method.lr_g) == (5, 0.01, 3e-3)
    assert method.steps_per_epoch(256) == 20
    _, fast = distill.parse(load_recipe("ssdkd/table-1", "cifar10-wrn_40_2-wrn_16_1-fast2"))
    assert (fast.inversion_steps, fast.lr_z, fast.lr_g, fast.kd_steps) == (2, 0.015, 5e-3, 400)
    assert (fast.sampling, fast.modulates) == ("uniform", False)


@pytest.mark.parametrize("cell", distinct())
def test_every_kind_of_recipe_takes_a_real_step(
    cell: Cell, teacher: str, segmenter: str, masked: str
) -> None:
    values = shrunk(cell)
    values["teacher"] = teacher
    if values["method"] == "dmkd":
        values["data"] = "digits"
    if values.get("task") == "segmentation":
        values |= {"teacher": segmenter, "student": "deeplabv3_mobilenet_v2", "test_data": masked}
        values["data"] = masked if values["method"] == "dmkd" else None
    config, method = distill.parse(values)
    assert distill.run(config, method, "nowhere", dry_run=True, progress=False)["loss"] > 0


BASE: dict[str, Any] = {
    "method": "ssdkd",
    "student": "resnet8",
    "epochs": 3,
    "batch_size": 8,
    "capacity": 24,
    "fill_epochs": 2,
    "inversion_steps": 2,
    "padding": 1,
    "log_every": 1,
    "lr": 0.02,
    **ALWAYS,
}


def go(out: Path, teacher: str, **values: Any) -> dict[str, Any]:
    resume = values.pop("resume", False)
    config, method = distill.parse({**BASE, "teacher": teacher, **values})
    return distill.run(config, method, out, resume=resume, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher: str) -> Path:
    out = tmp_path_factory.mktemp("run") / "ssd"
    torch.manual_seed(0)
    go(out, teacher, test_data="digits")
    return out


def test_a_run_leaves_its_record(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["capacity"] == sum(metrics["category_counts"]) == sum(metrics["difficulty_counts"]) == 24
    assert metrics["synthesized_images"] == (2 + 3) * 8
    assert metrics["steps"] == 9
    assert metrics["images"] == 72
    assert metrics["seconds_by_phase"].keys() == {"inversion", "distillation"}
    assert 0 < sum(metrics["seconds_by_phase"].values()) < metrics["seconds"]
    assert len(metrics["class_accuracy"]) == 10
    assert (finished / PICTURE).stat().st_size > 0
    lines = [line for line in read_metrics(finished / "metrics.jsonl") if line["kind"] == "train"]
    assert len(lines) == 9
    assert {"phi", "priority", "importance", "bn", "oh", "adv", "inversion_loss", "agreement", "kl"} <= lines[
        -1
    ].keys()
    assert 0 < lines[-1]["phi"] < 1


def test_the_inverted_images_are_a_set_for_another_student(
    finished: Path, teacher: str, tmp_path: Path
) -> None:
    """All of the last checkpoint's buffer, bit by bit, and a recipe learns from the folder."""
    words = ["export", str(finished), "--to", "shards", "--out", str(tmp_path / "set"), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {"folder": str(tmp_path / "set"), "images": 24, "classes": 10}
    (rank,) = load_checkpoint(finished / "checkpoints").states["loader"]
    held = rank["method"]["buffer"]
    loader = ShardLoader(tmp_path / "set", 24, shuffle=False, loader="torch")
    images, labels = next(iter(loader))
    assert torch.equal((images * 255).round().to(torch.uint8), held["rows"])
    assert torch.equal(labels, held["labels"].long())
    values = {"method": "dmkd", "student": "resnet8", "teacher": teacher, "data": str(tmp_path / "set")}
    config, method = distill.parse({**values, "epochs": 1, "batch_size": 8, "device": "cpu"})
    assert distill.run(config, method, tmp_path / "other", progress=False)["images"] == 24
    with pytest.raises(ShardError):
        kdfast.export(finished, to="shards", out=tmp_path / "set")
    assert kdfast.export(finished, to="shards")["folder"] == str(finished / "shards")
    with pytest.raises(ConfigError, match=r"checkpoints.* is of another method"):
        kdfast.export(tmp_path / "other", to="shards")


def test_the_buffers_of_all_processes_are_one_set(finished: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(finished / "checkpoints")
    (rank,) = checkpoint.states["loader"]
    states = {**checkpoint.states, "loader": [rank, rank]}
    save_checkpoint(tmp_path / "checkpoints", states, step=9)
    assert kdfast.export(tmp_path, to="shards", out=tmp_path / "set")["images"] == 48


def test_what_holds_no_inverted_images_is_refused(finished: Path, teacher: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no checkpoints/, accepted with --to shards: .* ssdkd run"):
        kdfast.export(teacher, to="shards")
    with pytest.raises(ConfigError, match="--weights: got best, accepted with --to shards: last"):
        kdfast.export(finished, to="shards", weights="best")
    checkpoint = load_checkpoint(finished / "checkpoints")
    (rank,) = checkpoint.states["loader"]
    for number, (buffer, error, match) in enumerate(
        [
            (None, ConfigError, "replay was off"),
            ({"rows": torch.zeros(2)}, CheckpointError, "settings cannot"),
        ]
    ):
        changed = {**rank, "method": {**rank["method"], "buffer": buffer}}
        save_checkpoint(tmp_path / str(number) / "checkpoints", {"loader": [changed]}, step=9)
        with pytest.raises(error, match=match):
            kdfast.export(tmp_path / str(number), to="shards")


def test_the_student_is_a_plain_network(finished: Path) -> None:
    from safetensors.torch import load_file

    create_model("resnet8", 10).load_state_dict(load_file(finished / "model.safetensors"))


def test_the_report_draws_what_the_run_left(finished: Path, tmp_path: Path, teacher: str) -> None:
    page = write_report([finished], tmp_path / "one.html").read_text()
    for title in (
        "Categories",
        "Difficulty",
        "Modulation φ",
        "Priority",
        "Seconds by phase",
        "Accuracy by class",
    ):
        assert f">{title}<" in page, title
    assert "data:image/png;base64," in page
    assert "category counts" not in page
    other = tmp_path / "larger"
    go(other, teacher, test_data="digits", capacity=32)
    both = write_report([finished, other], tmp_path / "two.html").read_text()
    for title in ("Accuracy by data scale", "Time by data scale", "Categories", "Accuracy by class"):
        assert f">{title}<" in both, title
    # Two of one size do not differ in size alone: no line, and no failure.
    again = shutil.copytree(finished, tmp_path / "again")
    same = write_report([finished, other, again], tmp_path / "three.html").read_text()
    assert "Accuracy by data scale" not in same


@pytest.mark.usefixtures("heard")
def test_a_stopped_run_goes_on_exactly(tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an epoch: buffer, generator, random numbers and place are all in the checkpoint."""
    from kdfast.methods.ssdkd import SSDKD

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(whole, teacher)
    step, calls = SSDKD.step, []

    def stopping(self: SSDKD, student: Any = None) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 5:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return step(self, student)

    monkeypatch.setattr(SSDKD, "step", stopping)
    with pytest.raises(TrainingInterrupted):
        go(cut, teacher)
    monkeypatch.undo()
    go(cut, teacher, resume=True)
    ours, theirs = ((run / "model.safetensors").read_bytes() for run in (cut, whole))
    assert ours == theirs
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (cut, whole))
    assert first["category_counts"] == second["category_counts"]
    assert first["synthesized_images"] == second["synthesized_images"]


def test_a_segmentation_run_is_measured_by_miou(tmp_path: Path, segmenter: str, masked: str) -> None:
    values = {
        "task": "segmentation",
        "student": "deeplabv3_mobilenet_v2",
        "upsamplings": 3,
        "target": "teacher",
    }
    metrics = go(tmp_path / "run", segmenter, **values, test_data=masked, epochs=1)
    assert 0 <= metrics["miou"] <= 1
    assert sum(metrics["category_counts"]) == 24 * 32 * 32
    assert "class_accuracy" not in metrics


def test_what_the_method_makes_itself_is_refused(tmp_path: Path, teacher: str) -> None:
    with pytest.raises(
        ConfigError, match=r"data: got 'digits', accepted: none \(ssdkd makes its own images\)"
    ):
        go(tmp_path / "a", teacher, data="digits")
    with pytest.raises(ConfigError, match=r"augment: got \['flip'\], accepted: none"):
        go(tmp_path / "b", teacher, augment=["flip"])
    with pytest.raises(ConfigError, match=r"min_lr: got 0\.1, accepted: 0, or with schedule cosine up to lr"):
        go(tmp_path / "c", teacher, min_lr=0.1)
    assert not (tmp_path / "a").exists()


def test_a_cosine_ends_where_it_is_told(tmp_path: Path, teacher: str) -> None:
    rates = []
    for number, low in enumerate((0.0, 0.01)):
        go(tmp_path / str(number), teacher, schedule="cosine", min_lr=low, epochs=2)
        lines = read_metrics(tmp_path / str(number) / "metrics.jsonl")
        rates.append([line["lr"] for line in lines if line["kind"] == "train"])
    assert rates[0][-1] == 0
    assert rates[1][-1] == pytest.approx(0.01)


def test_some_real_images_are_as_many_of_each_class(tmp_path: Path) -> None:
    from kdfast.data import load_dataset

    digits = load_dataset("digits", "train", image_size=8)
    few = some_of(digits, 50, seed=3)
    assert few.images.shape == (50, 3, 8, 8)
    assert few.labels.bincount().tolist() == [5] * 10
    assert torch.equal(few.labels, some_of(digits, 50, seed=3).labels)
    with pytest.raises(DataError, match="has 1437 images, data_images asks for 2000"):
        some_of(digits, 2000, seed=0)


def test_the_buffers_picture_has_a_class_a_row() -> None:
    images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1)
    labels = torch.tensor([2] * 20 + [0] * 3 + [1] * 7)
    rows = class_rows(images, labels).view(3, 12)
    assert rows[0].tolist() == [20, 21, 22] + [0] * 9
    assert rows[1].tolist() == list(range(23, 30)) + [0] * 5
    assert rows[2].tolist() == list(range(12))
    many = class_rows(torch.zeros(100, 1, 1, 1, dtype=torch.uint8), torch.arange(100))
    assert len(many) == 10 * 12


def test_seconds_add_up_over_phases_and_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = PhaseClock(torch.device("cpu"), {"inversion": 1.0})
    clock.start()
    clock.stop("inversion")
    clock.start()
    clock.stop("distillation", factor=2.0)
    assert clock.seconds() == {"inversion": 3.0, "distillation": 6.0}


def test_diverged_inversion_stops_the_run_before_a_checkpoint(tmp_path: Path, teacher: str) -> None:
    with pytest.raises(
        KDFastError, match=r"inversion's loss became (nan|inf) by round \d+; a lower lr_g or lr_z may help"
    ):
        go(tmp_path / "run", teacher, lr_g=1e30, lr_z=1e30, bn=1e38)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_run_of_bf16_inverts_under_autocast(tmp_path: Path, teacher: str) -> None:
    metrics = go(tmp_path / "run", teacher, precision="bf16", epochs=1)
    assert metrics["steps"] == 3


def test_seeds_are_summarised(tmp_path: Path, teacher: str) -> None:
    config, method = distill.parse({**BASE, "teacher": teacher, "epochs": 1, "test_data": "digits"})
    summary = distill.run_seeds(replace(config, seed=4), method, tmp_path / "runs", seeds=2, progress=False)
    assert summary["seeds"] == [4, 5]
    assert "accuracy_std" in summary
