"""Which images a command trains and measures on, however a folder is laid out and a split is spelled."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdfast.data import load_dataset
from kdfast.data.segmentation import is_segmentation_folder, open_segmentation
from kdfast.data.splits import ALIASES, split_name
from kdfast.errors import DataError
from kdfast.experiments.common.held_out import splits_itself
from kdfast.experiments.evaluate.config import EvalConfig
from kdfast.experiments.evaluate.run import run as evaluate
from kdfast.experiments.teach.config import TeachConfig
from kdfast.experiments.teach.run import run as teach

_NUMBERS = itertools.count()


def classes_of(root: Path, count: int, names: str = "ab") -> Path:
    """``count`` small images of each class below ``root``."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            image = np.full((8, 8, 3), 100 * number + next(_NUMBERS) % 90, np.uint8)
            Image.fromarray(image).save(root / name / f"{index}.png")
    return root


def masked(root: Path, count: int) -> None:
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for index in range(count):
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(root / "images" / f"{index}.png")
        Image.fromarray(np.full((8, 8), index % 2, np.uint8)).save(root / "masks" / f"{index}.png")


def test_a_folder_is_split_only_when_a_split_is_asked_for_and_says_so(tmp_path: Path) -> None:
    root = classes_of(tmp_path, 10)
    assert (len(load_dataset(root)), load_dataset(root).note) == (20, "")
    assert len(load_dataset(root, "test", whole=True)) == len(load_dataset(root, "train", whole=True)) == 20
    train, test = (load_dataset(root, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)
    assert "train is 16 of its 20 images" in train.note
    assert "test is 4 of its 20 images" in test.note


@pytest.mark.parametrize("alias", [*ALIASES["train"], "Train", "TRAINING"])
def test_training_folders_in_any_spelling(tmp_path: Path, alias: str) -> None:
    classes_of(tmp_path / alias, 3)
    classes_of(tmp_path / "x-rest", 2)
    data = load_dataset(tmp_path)
    assert (data.classes, len(data), data.note) == (("a", "b"), 6, "")


@pytest.mark.parametrize("alias", [*ALIASES["val"], *ALIASES["test"], "VAL", "Valid", "Test", "Validation"])
@pytest.mark.parametrize("asked", ["test", "val", "VAL", "Validation", "Testing"])
def test_held_out_folders_in_any_spelling(tmp_path: Path, alias: str, asked: str) -> None:
    classes_of(tmp_path / "Train", 3)
    classes_of(tmp_path / alias, 2)
    assert (len(load_dataset(tmp_path, asked)), len(load_dataset(tmp_path, "all"))) == (4, 10)
    assert len(load_dataset(tmp_path, asked, whole=True)) == 4


def test_validation_and_test_beside_each_other(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("Val", 2), ("test", 1)):
        classes_of(tmp_path / name, count)
    assert [len(load_dataset(tmp_path, name)) for name in ("train", "val", "test", "all")] == [6, 4, 2, 12]


def test_names_that_are_no_split() -> None:
    for wrong in ("dev", "", "trains"):
        with pytest.raises(ValueError, match="split is one of train, val, test, all"):
            split_name(wrong)


@pytest.mark.parametrize("alias", ["val", "VAL", "Validation", "TEST"])
def test_masks_have_the_same_splits(tmp_path: Path, alias: str) -> None:
    masked(tmp_path / "Train", 4)
    masked(tmp_path / alias, 2)
    assert is_segmentation_folder(tmp_path)
    sizes = [len(open_segmentation(tmp_path, split)) for split in ("train", "val", "test", "all")]
    assert sizes == [4, 2, 2, 6]
    (tmp_path / "twice").mkdir()
    masked(tmp_path / "twice" / "val", 1)
    masked(tmp_path / "twice" / "Val", 1)
    with pytest.raises(DataError, match="only one of them can be the val split"):
        is_segmentation_folder(tmp_path / "twice")


def test_masks_without_splits_are_whole_unless_asked(tmp_path: Path) -> None:
    masked(tmp_path, 10)
    assert len(open_segmentation(tmp_path, "test", whole=True)) == 10
    test = open_segmentation(tmp_path, "val")
    assert len(test) == 2
    assert "val is 2 of its 10 images" in test.note


def test_hugging_face_splits_in_any_case(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    features = library.Features(image=library.Image(), label=library.ClassLabel(names=["a", "b"]))

    def table(count: int) -> Any:
        image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
        return library.Dataset.from_dict(
            {"image": [image] * count, "label": [i % 2 for i in range(count)]}, features=features
        )

    library.DatasetDict({"Train": table(10), "VAL": table(4)}).save_to_disk(tmp_path / "two")
    library.DatasetDict({"train": table(10)}).save_to_disk(tmp_path / "one")
    two, one = (f"hf:{tmp_path / name}" for name in ("two", "one"))
    assert [len(load_dataset(two, split)) for split in ("train", "val", "test", "all")] == [10, 4, 4, 14]
    assert [len(load_dataset(one, split)) for split in ("train", "test")] == [8, 2]
    assert len(load_dataset(one, "test", whole=True)) == len(load_dataset(one)) == 10


def test_an_explicit_pair_is_used_whole(tmp_path: Path) -> None:
    train, test = classes_of(tmp_path / "here", 10), classes_of(tmp_path / "there", 5)
    common: dict[str, Any] = {"data": str(train), "model": "resnet8", "image_size": 8, "epochs": 1}
    quiet: dict[str, Any] = {"progress": False}
    whole = TeachConfig(test_data=str(test), batch_size=10, **common)
    assert teach(whole, tmp_path / "run", **quiet)["images"] == 20
    held_out = TeachConfig(batch_size=8, **common)
    assert teach(held_out, tmp_path / "other", **quiet)["images"] == 16
    runs = str(tmp_path / "run")
    assert evaluate(EvalConfig(runs, str(test)), progress=False)["images"] == 10
    assert evaluate(EvalConfig(runs, str(test), split="val"), progress=False)["images"] == 2
    assert evaluate(EvalConfig(runs, str(test), split="train"), progress=False)["images"] == 8


def test_one_source_splits_itself_however_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert splits_itself("hf:some", "hf:some")
    assert splits_itself(str(tmp_path), f"{tmp_path}/link/")
    assert not splits_itself(str(tmp_path / "a"), str(tmp_path / "b"))
    assert not splits_itself("digits", None)
