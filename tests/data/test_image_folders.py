"""Image folders as people and their file managers leave them, and labels that go by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data import load_dataset
from kdfast.data.datasets import InMemoryImages
from kdfast.data.labelled import LabelledImages
from kdfast.data.matching import match_classes
from kdfast.data.segmentation import open_segmentation
from kdfast.errors import DataError
from tests.support.hostile import claims, png
from tests.support.shards import jpeg


def picture(path: Path, value: int = 0, size: tuple[int, int] = (6, 4), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        for i in range(5):
            picture(tmp_path / "set" / name / f"{i}.png", i)
    return tmp_path / "set"


def names(dataset: LabelledImages) -> list[str]:
    return sorted(path.name for path in dataset.paths)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "hidden", [".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/0.png", "._0.png", ".x/y/0.png"]
)
def test_hidden_folders_inside_a_class_are_not_read(folder: Path, hidden: str) -> None:
    picture(folder / "cat" / hidden)
    assert len(load_dataset(folder, "all")) == 10


def test_a_macosx_folder_beside_the_classes_is_not_one(folder: Path) -> None:
    picture(folder / "__MACOSX" / "cat" / "._0.png")
    assert load_dataset(folder, "all").classes == ("cat", "dog")


def test_linked_folders_inside_a_class_are_read(folder: Path, tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / "elsewhere" / f"more{i}.png")
    (folder / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    assert len(load_dataset(folder, "all")) == 13


def test_links_that_go_round_end(folder: Path) -> None:
    (folder / "cat" / "again").symlink_to(folder / "cat")
    (folder / "cat" / "up").symlink_to(folder)
    found = load_dataset(folder, "all")
    assert len([label for label in found.labels if label == 1]) == 5
    assert len(found) == 15  # `up` leads to dog's images once, not for ever


@pytest.mark.parametrize(
    "train, test", [("Train", "Test"), ("TRAIN", "VAL"), ("Training", "Validation"), ("train", "Valid")]
)
def test_splits_in_any_case(tmp_path: Path, train: str, test: str) -> None:
    for split in (train, test):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "0.png")
    assert load_dataset(tmp_path, "train").classes == ("cat", "dog")
    assert len(load_dataset(tmp_path, "test")) == 2


def test_two_spellings_of_one_split_are_refused(tmp_path: Path) -> None:
    for split in ("Train", "train"):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "0.png")
    with pytest.raises(DataError, match="Train and train; only one"):
        load_dataset(tmp_path)


def turned(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 100} if path.suffix == ".jpg" else {}
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
def test_pictures_are_turned_as_in_shards(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        turned(tmp_path / name / f"0{suffix}", 6)
        turned(tmp_path / name / f"1{suffix}", 6)
    image, _ = load_dataset(tmp_path, "all")[0]
    assert image.shape == (3, 8, 4)
    top, bottom = image[:, :4].float().mean(), image[:, 4:].float().mean()
    assert (top < 60, bottom > 195) == (True, True)


def test_a_mask_fits_the_picture_as_it_is_seen_or_as_it_is_stored(tmp_path: Path) -> None:
    for name, size in (("seen", (4, 8)), ("stored", (8, 4))):
        root = tmp_path / name
        turned(root / "images" / "0.jpg", 6)
        (root / "masks").mkdir()
        Image.new("L", size, 1).save(root / "masks" / "0.png")
        pixels, labels = open_segmentation(root, "all")[0]
        assert pixels.shape[1:] == labels.shape == size[::-1]


def test_float_and_32_bit_tiffs_are_bright_or_refused(folder: Path) -> None:
    Image.fromarray(np.full((4, 6), 0.5, np.float32)).save(folder / "cat" / "f.tiff")
    dataset = load_dataset(folder, "all")
    at = names(dataset).index("f.tiff")
    at = next(i for i, path in enumerate(dataset.paths) if path.name == "f.tiff")  # type: ignore[attr-defined]
    assert dataset[at][0].float().mean() == pytest.approx(128, abs=1)
    for bad in (
        np.full((4, 6), 200.0, np.float32),
        np.full((4, 6), np.nan, np.float32),
        np.full((4, 6), 9, np.int32),
    ):
        Image.fromarray(bad).save(folder / "cat" / "f.tiff")
        with pytest.raises(DataError, match=r"f\.tiff: it has (floating-point|32 bits)"):
            dataset[at]


@pytest.mark.parametrize(
    "name, data",
    [
        ("bomb.png", png(20_000, 20_000)),
        ("bomb.jpg", claims(jpeg(), 65_500, 65_500)),
        ("short.png", b"\x89PNG\r\n\x1a\n\0\0\0\5IHDR\0\0\0\0\0\0\0\0\0"),
        ("empty.webp", b"RIFF\0\0\0\0WEBP"),
        ("bomb.pgm", b"P5 60000 60000 255\n" + b"x" * 50),
        ("bomb.bmp", b"BM" + bytes(16) + (60000).to_bytes(4, "little") * 2 + bytes(60)),
    ],
)
def test_a_bomb_in_a_folder_is_named(folder: Path, name: str, data: bytes) -> None:
    (folder / "cat" / name).write_bytes(data)
    dataset = load_dataset(folder, "all")
    at = next(i for i, path in enumerate(dataset.paths) if path.name == name)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=name):
        dataset[at]


def labelled(classes: tuple[str, ...], labels: list[int]) -> InMemoryImages:
    return InMemoryImages(
        torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8), torch.tensor(labels), classes, "set"
    )


def test_classes_are_matched_by_name() -> None:
    matched = match_classes(labelled(("fox", "cat", "dog"), [0, 1, 2, 0]), ("cat", "dog", "fox"), 3)
    assert matched.labels.tolist() == [2, 0, 1, 2]
    assert matched.classes == ("cat", "dog", "fox")


def test_a_split_may_lack_classes() -> None:
    assert match_classes(labelled(("dog",), [0, 0]), ("cat", "dog"), 2).labels.tolist() == [1, 1]
    assert match_classes(labelled(("dog", "owl"), [0, 0]), ("cat", "dog"), 2).labels.tolist() == [1, 1]


def test_what_cannot_be_matched_shows_both_lists() -> None:
    with pytest.raises(DataError, match=r"class 'ant' .*\['ant', 'bee', 'cat'\].*\['cat', 'dog', 'fox'\]"):
        match_classes(labelled(("ant", "bee", "cat"), [0, 1, 2]), ("cat", "dog", "fox"), 3)
    with pytest.raises(DataError, match="two classes have one name"):
        match_classes(labelled(("cat", "cat"), [0, 1]), ("cat", "dog"), 2)


def test_numbers_without_names_are_taken_as_they_are() -> None:
    plain = labelled(("0", "1", "2"), [2, 0])
    plain.named = False
    assert match_classes(plain, ("cat", "dog", "fox"), 3).labels.tolist() == [2, 0]
    with pytest.raises(DataError, match="has 3 classes, expected 2"):
        match_classes(plain, ("cat", "dog"), 2)
    # A network without names: by number, too.
    assert match_classes(labelled(("fox", "cat"), [1]), (), 10).labels.tolist() == [1]


def test_masks_are_matched_by_name(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "0.png", size=(3, 1))
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.array([[0, 1, 255]], np.uint8)).save(tmp_path / "masks" / "0.png")
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    matched = match_classes(open_segmentation(tmp_path, "all"), ("sky", "tree", "road"), 3)
    assert matched[0][1].tolist() == [[2, 0, 255]]
    with pytest.raises(DataError, match="class 'road' is not one of the network's"):
        match_classes(open_segmentation(tmp_path, "all"), ("sky", "tree"), 2)


def test_a_list_of_classes_that_is_no_list_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "0.png")
    picture(tmp_path / "masks" / "0.png")
    for data in (b"\xff\xfe", b"", b"a\na\n"):
        (tmp_path / "classes.txt").write_bytes(data)
        with pytest.raises(DataError, match=r"classes\.txt"):
            open_segmentation(tmp_path, "all")
    (tmp_path / "classes.txt").unlink()
    os.mkfifo(tmp_path / "classes.txt")
    with pytest.raises(DataError, match="is a pipe"):
        open_segmentation(tmp_path, "all")
