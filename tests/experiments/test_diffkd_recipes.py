"""Recipes of DiffKD and its baselines take one real step with tiny teachers; what a run leaves; the drawn shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdfast.data import ShardWriter
from kdfast.data.segmentation import IGNORE, open_segmentation
from kdfast.data.shapes import CLASSES, main, write_shapes
from kdfast.errors import ConfigError
from kdfast.experiments.common.recipe import load_recipe
from kdfast.experiments.distill import run as distill
from kdfast.methods.diffkd import DiffKDConfig
from kdfast.models import create_model
from kdfast.report import write_report
from kdfast.training.model_io import ModelConfig, load_model, save_model
from tests.support.recipes import Cell, cells, parameters
from tests.support.shards import pictures

RECIPES = cells("diffkd")
# One of each kind of method, networks, strategy and task; the others differ from these in numbers.
QUICK = {
    *("digits", "digits-kd", "shapes-segmentation", "cifar100-wrn_40_2-wrn_40_1"),
    *(f"cifar100-resnet32x4-resnet8x4-{name}" for name in ("at", "dist", "dkd", "fitnet", "rkd")),
    *("imagenet-strong-resnet50-mobilenet_v2", "imagenet-strong-swin_l-swin_t", "ablation-autoencoder-128"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers of 16-pixel images and of 32-pixel masks, and a few of both."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    half = ((0.5,) * 3, (0.5,) * 3)
    save_model(folder / "teacher", create_model("resnet8", 6), ModelConfig("resnet8", 6, 16, *half))
    name, options = "deeplabv3_mobilenet_v2", {"stem": "cifar"}
    save_model(
        folder / "dense", create_model(name, 4, **options), ModelConfig(name, 4, 32, *half, options=options)
    )
    with ShardWriter(folder / "shards", num_classes=6) as writer:
        writer.write(pictures(12, 16), torch.arange(12) % 6)
    write_shapes(folder / "shapes", train=4, test=2, size=32)
    return folder


def shrunk(values: dict[str, Any], tiny: Path) -> dict[str, Any]:
    """A recipe with a tiny teacher, set and autoencoder in place of its own."""
    values = dict(values)
    if values["student"].startswith("timm:"):
        values["student"] = "vgg8"  # timm does not import beside the CPU build of torch
    if values["method"] == "diffkd" and values.get("latent_channels", 1024):
        values["latent_channels"] = min(16, values.get("latent_channels", 1024))
    dense = values.get("task") == "segmentation"
    return values | {
        "teacher": str(tiny / ("dense" if dense else "teacher")),
        "data": str(tiny / ("shapes" if dense else "shards")),
        "test_data": None,
        "batch_size": 2,
        "image_size": 32 if dense or "imagenet" in str(values.get("stem")) else 16,
        "load_size": None,
        "stem": "cifar" if dense else values.get("stem"),
        "precision": "fp32",
        "device": "cpu",
        "loader": "torch",
        "workers": 0,
    }


def test_there_is_a_recipe_for_each_cell() -> None:
    names = {cell.stem for cell in RECIPES}
    assert names >= QUICK
    assert len([name for name in names if name.startswith("cifar100-")]) == 12
    assert len([name for name in names if name.startswith("ablation-")]) == 13


@pytest.mark.parametrize("cell", parameters(RECIPES, QUICK))
def test_a_recipe_takes_a_step(cell: Cell, tiny: Path) -> None:
    config, method = distill.parse(shrunk(cell.values, tiny), source=cell.stem)
    result = distill.run(config, method, tiny / "unused", dry_run=True, progress=False)
    assert 0 < result["loss"] < float("inf")
    assert not (tiny / "unused").exists()


@pytest.mark.parametrize("cell", parameters(RECIPES))
def test_a_recipe_as_it_stands_is_valid(cell: Cell) -> None:
    config, _ = distill.parse(cell.values, source=cell.stem)
    schedule = config.trainer_config().schedule
    assert schedule.milestones == () or schedule.milestones[-1] < config.epochs


def test_the_papers_numbers() -> None:
    config, method = distill.parse(load_recipe("diffkd/table-3", "swin_l-resnet50"))
    assert (config.optimizer, config.lr, config.weight_decay) == ("rmsprop", 0.048, 1e-5)
    assert (config.schedule, config.decay_epochs, config.lr_decay) == ("step", 2.4, 0.97)
    assert (config.epochs, config.batch_size, config.ema_decay) == (450, 768, 0.9999)
    assert (method.latent_channels, method.label_smoothing) == (768, 0.1)
    config, method = distill.parse(load_recipe("diffkd/table-3", "swin_l-swin_t"))
    assert (config.optimizer, config.lr, config.weight_decay, config.epochs) == ("adamw", 5e-4, 0.05, 300)
    assert (method.mixup_alpha, method.cutmix_alpha) == (0.8, 1.0)
    config, method = distill.parse(load_recipe("diffkd/table-2", "resnet34-resnet18"))
    assert (config.milestones, config.lr, config.batch_size) == ((30, 60, 90), 0.1, 256)
    assert method == DiffKDConfig()
    assert (method.latent_channels, method.steps, method.temperature) == (1024, 5, 1.0)
    _, method = distill.parse(load_recipe("diffkd/table-7", "adapter-off"))
    assert method.adapter is False


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of the digits recipe on a dozen images, with a moving average."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "student"
    values = shrunk(load_recipe("diffkd/digits"), tiny)
    values |= {"epochs": 2, "log_every": 1, "ema_decay": 0.5, "test_data": "digits", "warmup_epochs": 0}
    torch.manual_seed(0)
    teacher = create_model("resnet8", 10)
    save_model(tiny / "ten", teacher, ModelConfig("resnet8", 10, 16, (0.5,) * 3, (0.5,) * 3))
    with ShardWriter(tiny / "digits", num_classes=10) as writer:
        writer.write(pictures(12, 16), torch.arange(12) % 10)
    values |= {
        "teacher": str(tiny / "ten"),
        "data": str(tiny / "digits"),
        "batch_size": 6,
        "tensorboard": False,
    }
    distill.run(*distill.parse(values), out, progress=False)
    return out


def test_a_run_leaves_a_clean_student_its_parts_and_a_picture(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["nfe"] == 5
    assert metrics["activation_bytes_per_image"] > 0
    assert (trained / "samples-features.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) == 4
    assert {"task", "kd_feature", "kd_logits", "gamma_feature", "diffusion_logits"} <= set(train[0])
    student = load_model(trained)
    assert sorted(student.state_dict()) == sorted(create_model("resnet8", 10).state_dict())


def test_the_report_draws_parts_gamma_and_features(trained: Path, tmp_path: Path) -> None:
    page = write_report([trained], tmp_path / "report.html").read_text()
    for words in ("Loss parts: feature", "Loss parts: logits", "mean γ", "where the feature is strong"):
        assert words in page
    assert "Accuracy by evaluations" not in page


def test_the_report_draws_accuracy_over_evaluations(tmp_path: Path) -> None:
    for steps, accuracy in ((1, 0.5), (5, 0.75)):
        (tmp_path / f"n{steps}").mkdir()
        (tmp_path / f"n{steps}" / "metrics.json").write_text(json.dumps({"nfe": steps, "accuracy": accuracy}))
    runs = [tmp_path / "n5", tmp_path / "n1"]
    assert "Accuracy by evaluations" in write_report(runs, tmp_path / "a.html").read_text()
    assert "network evaluations" not in write_report(runs[:1], tmp_path / "b.html").read_text()


def test_wrong_layers_of_a_recipe_are_named(tiny: Path) -> None:
    values = shrunk(load_recipe("diffkd/digits"), tiny)
    for layer in ("student_layer", "teacher_layer"):
        config, method = distill.parse({**values, layer: "layer9"})
        with pytest.raises(ConfigError, match="did you mean layer"):
            distill.run(config, method, tiny / "unused", dry_run=True, progress=False)
    values.pop("latent_channels")
    config, method = distill.parse({**values, "method": "fitnet", "student_layers": ["layer9"]})
    with pytest.raises(ConfigError, match="did you mean layer"):
        distill.run(config, method, tiny / "unused", dry_run=True, progress=False)


def test_shapes_are_drawn_alike_from_one_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shapes(tmp_path / "a", train=6, test=2, size=32)
    main([str(tmp_path / "b"), "--train", "6", "--test", "2", "--size", "32"])
    assert str(tmp_path / "b") in capsys.readouterr().out
    write_shapes(tmp_path / "c", train=6, test=2, size=32, seed=1)
    sets = [open_segmentation(tmp_path / name, "train") for name in "abc"]
    assert [len(each) for each in sets] == [6, 6, 6]
    assert sets[0].classes == CLASSES
    assert all(torch.equal(x, y) for one, two in zip(sets[0], sets[1]) for x, y in zip(one, two))
    assert not torch.equal(sets[0][0][0], sets[2][0][0])
    masks = torch.stack([mask for _, mask in sets[0]])
    assert set(np.unique(masks.numpy())) == {0, 1, 2, 3, IGNORE}
    assert 0.2 < float((masks == 0).float().mean()) < 0.9
    with pytest.raises(ValueError, match="size, train, test: got 8"):
        write_shapes(tmp_path / "d", size=8)
