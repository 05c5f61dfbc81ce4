"""Recipes of DM-KD build their networks and take one real step, with a tiny teacher and set in place of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdfast.data import ShardWriter
from kdfast.experiments.distill import run as distill
from kdfast.models import create_model
from kdfast.training.model_io import ModelConfig, save_model
from tests.support.recipes import Cell, cells, parameters
from tests.support.shards import pictures

RECIPES = cells("dmkd")
# One of each kind of networks, labels and augmentation; the others differ from these in numbers.
QUICK = {"cifar100-wrn_40_2-wrn_16_1", "digits", "table10-resnet18-resnet18-both", "table3-resnet18-140k"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 16-pixel images with 6 classes, and 12 images."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    description = ModelConfig("resnet8", 6, 16, (0.5,) * 3, (0.5,) * 3)
    save_model(folder / "teacher", create_model("resnet8", 6), description)
    with ShardWriter(folder / "shards", num_classes=6) as writer:
        writer.write(pictures(12, 16), torch.arange(12) % 6)
    return folder


@pytest.mark.parametrize("cell", parameters(RECIPES, QUICK))
def test_a_recipe_takes_a_step(cell: Cell, tiny: Path) -> None:
    values = cell.values
    if values["student"].startswith("timm:"):
        values["student"] = "vgg8"  # timm does not import beside the CPU build of torch
    values |= {
        "teacher": str(tiny / "teacher"),
        "data": str(tiny / "shards"),
        "test_data": None,
        "data_images": None,  # more than there are
        "batch_size": 2,
        "image_size": 32 if "imagenet" in str(values.get("stem")) else 16,
        "load_size": None,
        "precision": "fp32",
        "device": "cpu",
        "loader": "torch",
        "workers": 0,
    }
    config, method = distill.parse(values, source=cell.stem)
    result = distill.run(config, method, tiny / "unused", dry_run=True, progress=False)
    assert 0 < result["loss"] < float("inf")
    assert not (tiny / "unused").exists()
