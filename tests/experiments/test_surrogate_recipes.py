"""The surrogate recipes say what the paper does, and each takes one real step with a tiny teacher and set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.experiments.distill import run as distill
from kdfast.experiments.teach import run as teach
from kdfast.methods import SurrogateKDConfig
from kdfast.models import create_model
from kdfast.training.model_io import ModelConfig
from tests.experiments.test_recipe_dry_runs import tiny  # noqa: F401
from tests.support.recipes import Cell, cells, parameters

RECIPES = cells("surrogate")
# One of each kind of target, attack and stem; the others differ from these in numbers.
QUICK = {
    "digits",
    "table1-pets-mobilenet_v2-shaders",
    "table4-cifar10-shaders-label_smoothing",
    "table6-cifar10-shaders-attack",
}


def test_every_row_of_the_tables_is_there() -> None:
    names = [cell.stem for cell in RECIPES]
    counts = {f"table{n}": sum(name.startswith(f"table{n}-") for name in names) for n in (1, 2, 4, 5, 6, 7)}
    # 12 pairs on up to twelve sets; 4 sets of 2 teachers on three, and the patient run; 2 targets and 4 subsets of
    # 2 sets; 8 augmentations of 2; 4 teachers of 4 sets; 2 of 4.
    assert counts == {"table1": 138, "table2": 25, "table4": 12, "table5": 16, "table6": 16, "table7": 8}
    assert len(names) == sum(counts.values()) + 1


@pytest.mark.parametrize("cell", parameters(RECIPES))
def test_a_recipe_is_valid_and_its_network_exists(cell: Cell) -> None:
    config, method = distill.parse(cell.values, source=cell.stem)
    assert isinstance(method, SurrogateKDConfig)
    create_model(config.student, 10, **config.model_options())
    if cell.stem != "digits":
        assert (config.lr, config.momentum, config.weight_decay) == (0.1, 0.9, 1e-4)
        assert (config.batch_size, config.schedule) == (256, "cosine")
        assert config.epochs == (1200 if "1200" in cell.stem else 400)
        # By the images that are distilled with: 2 for general-purpose sets, 20 for fine-grained and synthetic ones.
        images = str(config.data)
        general = images.endswith(("cifar10", "cifar100", "tiny", "tiny-imagenet", "domain"))
        assert method.temperature == (2 if general or "original" in images else 20)
        assert method.attack == cell.stem.startswith("table6")


@pytest.mark.parametrize("cell", parameters(RECIPES, QUICK))
def test_a_recipe_takes_a_step(cell: Cell, tiny: Path) -> None:  # noqa: F811
    values = cell.values | {
        "teacher": str(tiny / "teacher"),
        "data": str(tiny / "shards"),
        "test_data": None,
        "batch_size": 4,
        "image_size": 32 if cell.values.get("stem") == "imagenet" else 16,
        "precision": "fp32",
        "device": "cpu",
        "loader": "torch",
        "workers": 0,
    }
    config, method = distill.parse(values, source=cell.stem)
    result = distill.run(config, method, tiny / "unused", dry_run=True, progress=False)
    assert 0 < result["loss"] < float("inf")
    assert not (tiny / "unused").exists()


def test_a_teacher_can_begin_with_pretrained_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = []

    def build(self: ModelConfig) -> torch.nn.Module:
        built.append(dict(self.options))
        return create_model("resnet8", self.num_classes)

    monkeypatch.setattr(ModelConfig, "build", build)
    common: dict[str, Any] = {"data": "digits", "image_size": 8, "device": "cpu", "batch_size": 8}
    for pretrained in (False, True):
        config = teach.TeachConfig(model="timm:vit", pretrained=pretrained, **common)
        teach.run(config, tmp_path / "none", dry_run=True)
    assert built == [{}, {"pretrained": True}]


def test_a_teacher_can_be_taught_with_a_regime(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(4, 3, 8, 8)
    common: dict[str, Any] = {"data": "digits"}
    for name in ("standard", "high", "extreme"):
        augment = teach.TeachConfig(augment=(name,), **common).augmentation(8)
        assert augment is not None
        changed = augment(images, torch.Generator().manual_seed(0))
        assert changed.shape == images.shape
        assert not torch.equal(changed, images)
