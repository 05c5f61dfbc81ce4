"""Segmentation folders: what is read, what is refused, and the path from masks to mIoU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kdfast.cli.app import app
from kdfast.data.segmentation import IGNORE, is_segmentation_folder, open_segmentation
from kdfast.errors import ConfigError, DataError
from kdfast.experiments.common.augmentation import Augmentation, scale_crop
from kdfast.experiments.common.recipe import build_config
from kdfast.experiments.distill import run as distill
from kdfast.experiments.teach import run as teach
from kdfast.experiments.teach.config import TeachConfig
from kdfast.training.mixing import task_loss


def write_pairs(folder: Path, count: int, *, size: int = 24, seed: int = 0) -> None:
    """Dark images with one bright square each; its pixels are class 1, a border row does not count."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for number in range(count):
        image = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
        mask = np.zeros((size, size), np.uint8)
        top, left = rng.integers(1, size // 2, 2)
        image[top : top + 10, left : left + 10] += 150
        mask[top : top + 10, left : left + 10] = 1
        mask[0] = IGNORE
        Image.fromarray(image).save(folder / "images" / f"{number:03}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:03}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "set", 10)
    return tmp_path / "set"


def test_images_and_masks_are_read_alike(folder: Path) -> None:
    assert is_segmentation_folder(folder)
    data = open_segmentation(folder, "all")
    assert (len(data), data.num_classes, data.classes) == (10, 2, ("0", "1"))
    image, mask = data[0]
    assert (image.dtype, image.shape, mask.dtype, mask.shape) == (
        torch.uint8,
        (3, 24, 24),
        torch.int64,
        (24, 24),
    )
    assert set(mask.unique().tolist()) == {0, 1, IGNORE}
    assert torch.equal(image.float().mean(0) > 100, mask == 1)  # the bright square is class 1
    small, small_mask = open_segmentation(folder, "all", image_size=12)[0]
    assert small.shape == (3, 12, 12)
    assert set(small_mask.unique().tolist()) <= {0, 1, IGNORE}  # nearest: no class between two others


def test_splits_are_folders_or_every_fifth(folder: Path, tmp_path: Path) -> None:
    train, test = open_segmentation(folder, "train"), open_segmentation(folder, "test")
    assert (len(train), len(test)) == (8, 2)
    assert {i for i, _ in train.pairs}.isdisjoint({i for i, _ in test.pairs})
    write_pairs(tmp_path / "split" / "train", 3)
    write_pairs(tmp_path / "split" / "val", 2, seed=1)
    (tmp_path / "split" / "classes.txt").write_text("ground\nsquare\n")
    assert len(open_segmentation(tmp_path / "split", "test")) == 2
    assert open_segmentation(tmp_path / "split", "train").classes == ("ground", "square")
    assert len(open_segmentation(tmp_path / "split", "all")) == 5


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    assert not is_segmentation_folder(tmp_path)
    with pytest.raises(DataError, match="holds no images/ and masks/ folders"):
        open_segmentation(tmp_path)
    with pytest.raises(ValueError, match="split is one of train, val, test, all, got 'dev'"):
        open_segmentation(folder, "dev")
    with pytest.raises(DataError, match=r"masks.000\.png: holds class 1, accepted: 0…0, and 255"):
        open_segmentation(folder, "all", num_classes=1)[0]
    (folder / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"classes\.txt: names 3 classes, expected 2"):
        open_segmentation(folder, num_classes=2)
    (folder / "classes.txt").unlink()
    Image.new("RGB", (24, 24)).save(folder / "masks" / "001.png")
    with pytest.raises(DataError, match=r"001\.png: has mode RGB, accepted: one channel"):
        open_segmentation(folder, "all", num_classes=2)[1]
    Image.new("L", (20, 24)).save(folder / "masks" / "002.png")
    with pytest.raises(DataError, match=r"002\.png: is \(20, 24\), its image 002\.png is \(24, 24\)"):
        open_segmentation(folder, "all", num_classes=2)[2]
    (folder / "masks" / "003.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read image .*003\.png"):
        open_segmentation(folder, "all", num_classes=2)[3]
    (folder / "masks" / "004.png").unlink()
    with pytest.raises(DataError, match=r"image .*004\.png: has no mask .*004\.png"):
        open_segmentation(folder, "all", num_classes=2)


def test_scale_crop_moves_image_and_mask_together() -> None:
    masks = torch.zeros(64, 32, 32, dtype=torch.long)
    masks[:, 8:24, 8:24] = 1
    images = masks[:, None].float().expand(-1, 3, -1, -1)
    moved, labels = scale_crop(images, masks, torch.Generator().manual_seed(0))
    inside = labels != IGNORE
    assert set(labels.unique().tolist()) == {0, 1, IGNORE}
    # Bilinear and nearest sampling differ at edges alone.
    agree = ((moved[:, 0] > 0.5) == (labels == 1))[inside].float().mean()
    assert agree > 0.97
    areas = (labels == 1).flatten(1).sum(1)
    assert areas.min() < 150 < 400 < areas.max()  # 256 before: both smaller and larger scales occur
    assert not moved[~inside[:, None].expand_as(moved)].any()


def test_flip_moves_image_and_mask_together_and_the_rest_is_refused() -> None:
    masks = torch.arange(16).view(1, 1, 16).expand(32, 4, 16).contiguous()
    images = masks[:, None].float().expand(-1, 3, -1, -1)
    moved, labels = Augmentation(("flip",), 16).with_masks(images, masks, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 0].long(), labels)
    turned = (labels[:, 0, 0] == 15).sum()
    assert 0 < turned < 32
    with pytest.raises(ConfigError, match="augment: got 'crop', accepted for segmentation: scale_crop, flip"):
        Augmentation(("crop",), 16).with_masks(images, masks, torch.Generator())
    with pytest.raises(ConfigError, match="augment: got 'scale_crop', accepted for classification"):
        Augmentation(("scale_crop",), 16)(images, torch.Generator())


def test_task_loss_resizes_logits_and_ignores_255() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = torch.randint(3, (2, 8, 8))
    masks[:, :4] = IGNORE
    resized = torch.nn.functional.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    want = torch.nn.functional.cross_entropy(resized[:, :, 4:], masks[:, 4:])
    torch.testing.assert_close(task_loss(logits, masks), want)


def test_teach_and_eval_measure_miou(tmp_path: Path, folder: Path) -> None:
    values = {
        "data": str(folder),
        "task": "segmentation",
        "model": "deeplabv3_mobilenet_v2",
        "image_size": 24,
    }
    short = {
        "epochs": 1,
        "batch_size": 4,
        "augment": ["scale_crop", "flip"],
        "tensorboard": False,
        "lr": 0.01,
    }
    config = build_config(TeachConfig, {**values, **short, "workers": 0}, source="test")
    metrics = teach.run(config, tmp_path / "teacher", progress=False)
    assert 0 <= metrics["miou"] <= 1
    words = ["eval", str(tmp_path / "teacher"), "--data", str(folder), "-q", "--json"]
    everything = json.loads(CliRunner().invoke(app, words).output)
    assert everything["images"] == len(open_segmentation(folder, "all"))
    said = CliRunner().invoke(app, [*words, "--split", "test"])
    assert said.exit_code == 0, said.output
    measured = json.loads(said.output)
    assert measured["miou"] == pytest.approx(metrics["miou"])
    assert measured["images"] == 2
    # A student is measured by mIoU too.
    recipe = {
        "teacher": str(tmp_path / "teacher"),
        "student": "deeplabv3_mobilenet_v2",
        "task": "segmentation",
    }
    config, method = distill.parse({**recipe, "data": str(folder), "test_data": str(folder), **short})
    assert (config.task, method.temperature) == ("segmentation", 10)
