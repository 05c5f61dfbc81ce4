"""Kdiffusion from recipes: every one takes a real step; what a run leaves; the miniature."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.errors import ConfigError
from kdfast.experiments.common.recipe import build_config, load_recipe
from kdfast.experiments.distill import run as distill
from kdfast.experiments.report import run as report
from kdfast.experiments.teach import run as teach
from kdfast.models import create_model
from kdfast.report.reverse import parameter_figure, part_figures
from kdfast.report.runs import read_run
from kdfast.training.model_io import ModelConfig, load_model
from tests.conftest import INTERPRETING
from tests.support.recipes import Cell, cells, parameters

pytestmark = pytest.mark.skipif(INTERPRETING, reason="trains networks; the kernels have their own tests")

RECIPES = cells("kdiffusion")
#: One of each kind, for `make test`; the others are slow.
QUICK = {
    "cifar100-resnet32x4-shufflenet_v1-guided",
    "cifar100-mobilenet_v2-stages-3-4",
    "imagenet-resnet34-resnet18-single",
    "imagenet100-swin_t-mobilenet_v3-multi",
    "digits",
}


class Swin(nn.Module):
    """timm's names, and its layout: ``layers.N`` and ``norm`` put ``[B, H, W, C]`` out."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Halved(3 if k == 0 else 8 * k, 8 * (k + 1)) for k in range(4)])
        self.norm, self.head = nn.LayerNorm(32), nn.Sequential()
        self.head.add_module("fc", nn.Linear(32, num_classes))

    def get_classifier(self) -> nn.Module:
        return self.head.get_submodule("fc")

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.norm(x).mean((1, 2)))
        return out


class _Halved(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(F.avg_pool2d(x.movedim(-1, 1), 2).movedim(1, -1))
        return out


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: the activation is in the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


class MobileNetV3(nn.Module):
    """timm's names of the layers that recipes mention."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        names = {1: (2, "pwl", 3), 2: (3, "pwl", 3), 4: (2, "pwl", 3), 6: (1, "", 1)}
        self.blocks = nn.ModuleList()
        channels = 3
        for k in range(7):
            count, kind, number = names.get(k, (1, "pwl", 3))
            stage = nn.Sequential()
            for _ in range(count):
                block = nn.Sequential()
                block.add_module(f"conv_{kind}" if kind else "conv", nn.Conv2d(channels, 8, 1, bias=False))
                block.add_module(f"bn{number}", nn.BatchNorm2d(8) if kind else BatchNormAct2d(8))
                stage.append(block)
                channels = 8
            self.blocks.append(stage)
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.blocks:
            x = stage(x)
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cell], tuple[Any, Any]]:
    """A recipe's configs with networks of ten classes, on digits; teachers and timm's networks untrained."""

    def build(described: ModelConfig) -> nn.Module:
        return MobileNetV3(10) if described.model.startswith("timm:") else described.build()

    def load(source: str, keys: Any = None, **more: Any) -> tuple[nn.Module, ModelConfig]:
        name = source.removeprefix("timm:").partition(".")[0].rpartition("/")[2]
        name = name.partition("-")[2] or name
        name = "resnet14" if name == "teacher" else name
        network = Swin(10) if name.startswith("swin") else create_model(name, 10)
        return network.eval(), ModelConfig(name, 10, 32, (0.5,) * 3, (0.5,) * 3)

    def configs(cell: Cell) -> tuple[Any, Any]:
        monkeypatch.setattr("kdfast.experiments.distill.run.load_teacher", load)
        monkeypatch.setattr("kdfast.experiments.distill.run.build_network", build)
        small = {"data": "digits", "test_data": None, "image_size": 32, "load_size": 32, "batch_size": 2}
        small |= {"precision": "fp32", "device": "cpu", "label_column": None}
        values = {**cell.values, **small}
        if values.get("stem") == "imagenet":
            values |= {"image_size": 64, "load_size": 64}
        return distill.parse(values, source=cell.stem)

    return configs


@pytest.mark.parametrize("cell", parameters(RECIPES, QUICK))
def test_every_recipe_takes_a_real_step(cell: Cell, no_weights: Any, tmp_path: Path) -> None:
    config, method = no_weights(cell)
    assert distill.run(config, method, tmp_path / "out", dry_run=True, progress=False)["loss"] > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cell", parameters(RECIPES))
def test_every_recipe_is_valid_and_names_layers_that_exist(cell: Cell) -> None:
    config, method = distill.parse(cell.values, source=cell.stem)
    assert config.trainer_config().epochs == config.epochs
    if not config.student.startswith("timm:"):
        student = create_model(config.student, 10, **config.model_options())
        for op, norm in zip(method.student_layers, method.student_norms, strict=True):
            assert isinstance(student.get_submodule(op), nn.Conv2d)
            assert isinstance(student.get_submodule(norm), nn.BatchNorm2d)


def test_every_cell_of_the_tables_has_a_recipe() -> None:
    stems = [cell.stem for cell in RECIPES]
    pairs = ("resnet32x4-shufflenet_v1", "wrn_40_2-shufflenet_v1", "vgg13-mobilenet_v2")
    pairs += ("resnet50-mobilenet_v2", "resnet32x4-shufflenet_v2")
    want = [f"cifar100-{pair}-{row}" for pair in pairs for row in ("average", "single", "multi", "guided")]
    want += [
        f"cifar100-{pair}-m{m}"
        for pair in ("resnet32x4-shufflenet_v1", "resnet50-mobilenet_v2")
        for m in (2, 4, 8, 16)
    ]
    want += [f"cifar100-mobilenet_v2-stages-{stages}" for stages in ("none", "4", "3-4", "2-4", "1-4")]
    students = ("mobilenet_v2", "mobilenet_v3", "resnet18", "shufflenet_v1", "shufflenet_v2")
    pairs = tuple(f"imagenet100-swin_t-{student}" for student in students)
    pairs += ("imagenet-resnet50-mobilenet_v1", "imagenet-resnet34-resnet18")
    want += [f"{pair}-{row}" for pair in pairs for row in ("single", "multi")]
    assert sorted(stems) == sorted([*want, "digits"])


def test_tables_differ_where_they_say() -> None:
    def config(stem: str) -> Any:
        return distill.parse(load_recipe(f"kdiffusion/{stem}"))[1]

    pair = "cifar100-resnet32x4-shufflenet_v1"
    average, single, multi, guided = (config(f"{pair}-{r}") for r in ("average", "single", "multi", "guided"))
    assert (average.objective, single.objective) == ("average", "diffusion")
    assert (len(single.stages), len(multi.stages)) == (1, 3)
    assert (single.beta, multi.beta, guided.beta) == (0, 0, 1)
    assert [config(f"{pair}-m{m}").branches for m in (2, 4, 8, 16)] == [2, 4, 8, 16]
    alone = config("cifar100-mobilenet_v2-stages-2-4")
    assert (alone.alpha, alone.beta, len(alone.stages), alone.branches) == (0, 0, 3, 10)


TINY = {"batch_size": 32, "device": "cpu", "workers": 0, "tensorboard": False, "log_every": 5}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    values = {**TINY, "data": "digits", "model": "resnet8", "image_size": 8, "epochs": 1, "lr": 0.05}
    teach.run(teach_config(values), out, progress=False)
    return out


def teach_config(values: dict[str, Any]) -> Any:
    return build_config(teach.TeachConfig, values, source="teacher")


def values(teacher: Path, **more: Any) -> dict[str, Any]:
    layers = {"student_layers": ["layer3.0.conv2"], "student_norms": ["layer3.0.bn2"]}
    common = {"method": "kdiffusion", "teacher": str(teacher), "student": "resnet8", "data": "digits"}
    return {
        **TINY,
        **common,
        **layers,
        "teacher_layers": ["layer3"],
        "test_data": "digits",
        "epochs": 1,
    } | more


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    distill.run(*distill.parse(values(teacher, branches=3, ema_decay=0.9)), out, progress=False)
    return out


def test_the_student_has_not_one_extra_key(finished: Path) -> None:
    network = load_model(finished)
    assert sorted(network.state_dict()) == sorted(create_model("resnet8", 10).state_dict())


def test_a_run_leaves_its_loss_parts_and_its_extra_parameters(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    # Two further branches of a 64×64×3×3 convolution and its norm, and a bridge of 64×64 with its norm.
    assert metrics["extra_parameters"] == 2 * (64 * 64 * 9 + 2 * 64) + 64 * 64 + 2 * 64
    assert metrics["branches"] == 3
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "middle" in row]
    assert trained
    assert all(row["task"] > 0 and row["middle"] > 0 and row["guided"] > 0 for row in trained)
    assert (finished / "samples-features.png").stat().st_size > 1000


def test_the_report_draws_parts_pictures_and_parameters(
    finished: Path, teacher: Path, tmp_path: Path
) -> None:
    other = tmp_path / "single"
    wanted = values(teacher, branches=1, alpha=0, beta=0)
    distill.run(*distill.parse(wanted), other, progress=False)
    assert json.loads((other / "metrics.json").read_text())["extra_parameters"] == 64 * 64 + 2 * 64
    runs = {path.name: read_run(str(path)) for path in (finished, other)}
    assert [drawing.title for drawing in part_figures(runs[finished.name])] == ["Loss parts"]
    assert [drawing.title for drawing in parameter_figure(runs)] == ["Extra parameters and accuracy"]
    assert parameter_figure({"one": runs[finished.name]}) == []
    page = report([finished])[0].read_text()
    assert "Loss parts" in page
    assert "one branch" in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"student_layers": []}, "student_layers, teacher_layers: got 0 and 1"),
        ({"teacher_layers": ["layer2", "layer3"]}, "got 1 and 2"),
        ({"student_norms": ["a", "b"]}, "student_norms: got 2"),
        ({"student_layer": ["conv1"]}, "did you mean 'student_layers'"),
    ],
)
def test_layers_that_do_not_pair_up_are_refused(teacher: Path, more: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distill.parse(values(teacher, **more))


def test_a_layer_that_does_not_exist_is_named(teacher: Path, tmp_path: Path) -> None:
    config = distill.parse(values(teacher, student_layers=["layer3.0.conv3"]))
    with pytest.raises(ConfigError, match=r"did you mean layer3\.0\.conv"):
        distill.run(*config, tmp_path / "out", dry_run=True, progress=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_miniature_is_no_worse_than_plain_distillation(tmp_path: Path) -> None:
    """Three seeds each of the shipped recipe and of plain KD, on the same teacher; printed, and bounded loosely."""
    settings = {"epochs": 8, "lr": 0.1, "schedule": "cosine", "warmup_epochs": 1, "batch_size": 64}
    base = {
        **settings,
        "data": "digits",
        "model": "resnet14",
        "image_size": 16,
        "device": "cpu",
        "workers": 0,
    }
    teach.run(teach_config(base), tmp_path / "teacher", progress=False)
    accuracy: dict[str, list[float]] = {}
    for name in ("kdiffusion/digits", "diffkd/digits-kd"):
        recipe = load_recipe(name)
        recipe |= {"teacher": str(tmp_path / "teacher"), "device": "cpu", "workers": 0, "epochs": 8}
        config, method = distill.parse(recipe)
        out = distill.run_seeds(config, method, tmp_path / name.replace("/", "-"), seeds=3, progress=False)
        accuracy[name] = out["accuracy"]
    print(accuracy)
    ours, plain = (torch.tensor(found) for found in accuracy.values())
    # Seeds 0, 1 and 2 of the shipped recipe: 99.4, 98.9 and 99.7 %. 360 images tell no finer difference of means.
    assert ours.mean() > 0.9
    assert ours.mean() > plain.mean() - 0.05
