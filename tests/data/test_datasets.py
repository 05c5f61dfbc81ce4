"""Labelled data sets: digits, folders, Hugging Face; what they hold and what they refuse."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from kdfast.data.datasets import InMemoryImages, load_dataset, to_memory
from kdfast.data.labelled import hold_out, rgb_tensor
from kdfast.errors import DataError, MissingExtraError


def save(path: Path, value: int = 0, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value, 255 - value)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with 5, 10 and 1 images; the first pixel's red says which image it is."""
    root = tmp_path / "flat"
    for index in range(5):
        save(root / "cat" / f"{index}.png", index)
    for index in range(10):
        save(root / "ant" / "nested" / f"{index}.bmp", 20 + index)
    save(root / "bee" / "only.PNG", 90)
    (root / "bee" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    return root


# Digits


def test_digits_are_split_once_and_stratified() -> None:
    train, test, everything = (
        load_dataset("digits", split, image_size=8) for split in ("train", "test", "all")
    )
    assert (len(train), len(test), len(everything)) == (1437, 360, 1797)
    assert train.classes == tuple("0123456789")
    assert train.num_classes == 10
    share = test.labels.bincount() / everything.labels.bincount()
    assert ((share - 0.2).abs() < 0.01).all()
    rows = lambda data: sorted(map(bytes, data.images.flatten(1).numpy()))  # noqa: E731
    assert sorted(rows(train) + rows(test)) == rows(everything)
    again = load_dataset("digits", "test", image_size=8)
    assert torch.equal(again.images, test.images)


def test_digits_pixels() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = load_dataset("digits", "all", image_size=8)
    expected = torch.from_numpy(bunch.images * 255 / 16).round().to(torch.uint8)
    assert torch.equal(small.images, expected.unsqueeze(1).expand(-1, 3, -1, -1))
    assert torch.equal(small.labels, torch.from_numpy(bunch.target))
    image, label = load_dataset("digits")[0]
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)
    assert isinstance(label, int)
    # Twice the size puts a quarter of the neighbour into each new pixel (half-pixel centres).
    double = load_dataset("digits", "all", image_size=16).images[0, 0].double()
    row = torch.from_numpy(bunch.images[0]) * 255 / 16
    assert abs(double[0, 5] - (0.75 * row[0, 2] + 0.25 * row[0, 3])) <= 0.5


def test_digits_without_scikit_learn_say_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"kdfast\[train\]"):
        load_dataset("digits")


# Folders


def test_flat_folder_holds_out_a_fifth_of_each_class(folder: Path) -> None:
    train, test, everything = (load_dataset(folder, split) for split in ("train", "test", "all"))
    assert everything.classes == train.classes == test.classes == ("ant", "bee", "cat")
    assert everything.labels.bincount().tolist() == [10, 1, 5]
    assert train.labels.bincount(minlength=3).tolist() == [8, 1, 4]
    assert test.labels.bincount(minlength=3).tolist() == [2, 0, 1]
    assert {*train.paths, *test.paths} == set(everything.paths)
    assert not {*train.paths} & {*test.paths}


def test_folder_images_are_the_files(folder: Path) -> None:
    data = load_dataset(str(folder), "all")
    image, label = data[len(data) - 1]
    assert (image.shape, image.dtype, label) == ((3, 4, 6), torch.uint8, 2)
    assert image[:, 0, 0].tolist() == [4, 8, 251]
    assert [int(x[0, 0, 0]) for x, _ in data] == [*range(20, 30), 90, *range(5)]


def test_folder_resizes_the_shorter_side_and_crops_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(wide).save(tmp_path / name / "x.png")
    image, _ = load_dataset(tmp_path, "all", image_size=4)[0]
    assert torch.equal(image, torch.full((3, 4, 4), 200, dtype=torch.uint8))
    image, _ = load_dataset(tmp_path, "all", image_size=2)[0]
    assert image.shape == (3, 2, 2)


def test_folder_with_splits(tmp_path: Path) -> None:
    for index, name in enumerate(("train/a/1", "train/a/2", "train/b/1", "val/b/1")):
        save(tmp_path / f"{name}.png", index)
    (tmp_path / "val" / "a").mkdir()
    train, test, everything = (load_dataset(tmp_path, split) for split in ("train", "test", "all"))
    assert train.labels.tolist() == [0, 0, 1]
    assert test.labels.tolist() == [1]
    assert test.classes == ("a", "b")
    assert everything.labels.tolist() == [0, 0, 1, 1]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    save(tmp_path / "train" / "1.png")
    save(tmp_path / "aeroplane" / "1.png")
    assert load_dataset(tmp_path, "all").classes == ("aeroplane", "train")


def test_a_train_folder_alone_is_split(tmp_path: Path) -> None:
    for name in "ab":
        for index in range(5):
            save(tmp_path / "train" / name / f"{index}.png")
    assert len(load_dataset(tmp_path, "train")) == 8
    assert len(load_dataset(tmp_path, "test")) == 2


def test_a_test_folder_alone_has_no_train_split(tmp_path: Path) -> None:
    save(tmp_path / "test" / "a" / "1.png")
    save(tmp_path / "test" / "b" / "1.png")
    assert len(load_dataset(tmp_path, "test")) == 2
    assert len(load_dataset(tmp_path, "all")) == 2
    with pytest.raises(DataError, match="only a test split"):
        load_dataset(tmp_path, "train")


def test_loader_workers_and_shuffling_work(folder: Path) -> None:
    data = load_dataset(folder, "all", image_size=4)
    images, labels = next(iter(DataLoader(data, batch_size=16, shuffle=True, num_workers=1)))
    assert (images.shape, images.dtype, labels.dtype) == ((16, 3, 4, 4), torch.uint8, torch.int64)


def test_unreadable_image_names_the_file(folder: Path) -> None:
    damaged = folder / "ant" / "nested" / "3.bmp"
    damaged.write_bytes(damaged.read_bytes()[:40])
    data = load_dataset(folder, "all")
    with pytest.raises(DataError, match=f"cannot read image {damaged}"):
        data[3]
    other = folder / "cat" / "0.png"
    other.write_text("not an image")
    with pytest.raises(DataError, match=f"cannot read image {other}"):
        data[11]
    truncated = folder / "cat" / "1.png"
    Image.fromarray(np.random.randint(0, 255, (50, 50, 3), np.uint8)).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:3000])
    with pytest.raises(DataError, match=f"cannot read image {truncated}"):
        data[12]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no class subfolders; the form is"),
        (["1.png"], "holds images but no class subfolders"),
        (["a/1.png"], "has one subfolder, 'a'; at least two classes"),
        (["a/1.png", "b/1.txt"], r"class folder .*b holds no image \(.bmp, .gif"),
        (["train/1.png", "test/1.png"], "test holds no class subfolders"),
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], "class 'c', which is not among"),
        (["train/a/1.png", "train/b/1.txt", "test/a/1.png"], "class folder .*b holds no image"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.txt"], "the test split of .* holds no image"),
        (["a/1.png", "b/1.png"], "the test split of .* holds no image"),
    ],
)
def test_folders_of_another_form_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path, "test")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x.zip").touch()
    with pytest.raises(DataError, match="is a file, not a folder"):
        load_dataset(tmp_path / "x.zip")


# Hugging Face


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch):
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    # The library reads HF_HUB_OFFLINE when it is first imported, which another test may have caused already.
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    return library


def table(library, count: int = 10, **columns: object):
    images = [Image.new("RGB", (6, 4), (index, 0, 0)) for index in range(count)]
    data: dict[str, object] = {"picture": images, "kind": [index % 2 for index in range(count)], **columns}
    features = {"picture": library.Image(), "kind": library.ClassLabel(names=["no", "yes"])}
    for name in columns:
        features[name] = (
            library.ClassLabel(names=["x", "y"]) if name.endswith("label") else library.Value("int64")
        )
    return library.Dataset.from_dict(data, features=library.Features(features))


def test_hugging_face_directory_with_splits(tmp_path: Path, hugging_face) -> None:
    splits = {"train": table(hugging_face, 6), "validation": table(hugging_face, 3)}
    hugging_face.DatasetDict(splits).save_to_disk(tmp_path / "set")
    train = load_dataset(f"hf:{tmp_path / 'set'}", "train")
    assert (len(train), train.classes, train.labels.tolist()) == (6, ("no", "yes"), [0, 1, 0, 1, 0, 1])
    image, label = train[5]
    assert (image.shape, image.dtype, image[0, 0, 0].item(), label) == ((3, 4, 6), torch.uint8, 5, 1)
    assert train[0][0].shape == load_dataset(f"hf:{tmp_path / 'set'}", "test")[0][0].shape
    assert len(load_dataset(f"hf:{tmp_path / 'set'}", "test")) == 3
    assert len(load_dataset(f"hf:{tmp_path / 'set'}", "all")) == 9
    assert load_dataset(f"hf:{tmp_path / 'set'}", image_size=3)[0][0].shape == (3, 3, 3)


def test_hugging_face_directory_without_splits_holds_out_a_fifth(tmp_path: Path, hugging_face) -> None:
    table(hugging_face, 20).save_to_disk(tmp_path / "set")
    train, test = (load_dataset(f"hf:{tmp_path / 'set'}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)
    assert test.labels.bincount().tolist() == [2, 2]
    reds = [int(image[0, 0, 0]) for data in (train, test) for image, _ in data]
    assert sorted(reds) == list(range(20))
    assert all(label == int(image[0, 0, 0]) % 2 for image, label in test)


def test_hugging_face_reads_other_directories_too(tmp_path: Path, hugging_face, monkeypatch) -> None:
    monkeypatch.setattr(hugging_face.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save(tmp_path / "set" / "train" / "a" / "1.png", 7)
    save(tmp_path / "set" / "train" / "b" / "1.png", 9)
    data = load_dataset(f"hf:{tmp_path / 'set'}", "all")
    assert data.classes == ("a", "b")
    assert sorted(int(image[0, 0, 0]) for image, _ in data) == [7, 9]


def test_hugging_face_label_columns(tmp_path: Path, hugging_face) -> None:
    ones = [1] * 10
    table(hugging_face, fine_label=ones).save_to_disk(tmp_path / "fine")
    assert load_dataset(f"hf:{tmp_path / 'fine'}", "all").labels.tolist() == ones
    kinds = load_dataset(f"hf:{tmp_path / 'fine'}", "all", label_column="kind")
    assert kinds.classes == ("no", "yes")
    with pytest.raises(DataError, match="no label column 'kinds'; did you mean 'kind'"):
        load_dataset(f"hf:{tmp_path / 'fine'}", label_column="kinds")
    table(hugging_face, odd_label=ones).save_to_disk(tmp_path / "odd")
    with pytest.raises(DataError, match="several label columns; choose label_column from kind, odd_label"):
        load_dataset(f"hf:{tmp_path / 'odd'}")
    integers = table(hugging_face, labels=[index % 4 for index in range(10)]).remove_columns("kind")
    integers.save_to_disk(tmp_path / "integers")
    assert load_dataset(f"hf:{tmp_path / 'integers'}").classes == ("0", "1", "2", "3")


def test_hugging_face_refusals(tmp_path: Path, hugging_face) -> None:
    table(hugging_face).remove_columns("kind").save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(DataError, match=r"no label column; its columns are picture \(Image\)"):
        load_dataset(f"hf:{tmp_path / 'unlabelled'}")
    table(hugging_face).remove_columns("picture").save_to_disk(tmp_path / "blind")
    with pytest.raises(DataError, match="no image column"):
        load_dataset(f"hf:{tmp_path / 'blind'}")
    table(hugging_face, 0).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match=r"cannot load data set 'hf:.*empty'"):
        load_dataset(f"hf:{tmp_path / 'empty'}")
    hidden = table(hugging_face, label=[-1] * 10).remove_columns("kind")
    hidden.save_to_disk(tmp_path / "hidden")
    with pytest.raises(DataError, match="images without a label in column 'label'"):
        load_dataset(f"hf:{tmp_path / 'hidden'}")
    hugging_face.DatasetDict({"test": table(hugging_face)}).save_to_disk(tmp_path / "test-only")
    with pytest.raises(DataError, match="no train split; it has test"):
        load_dataset(f"hf:{tmp_path / 'test-only'}", "train")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"cannot load data set 'hf:.*nothing'"):
        load_dataset(f"hf:{tmp_path / 'nothing'}")


def test_hugging_face_unreadable_and_missing_images_are_named(tmp_path: Path, hugging_face) -> None:
    features = hugging_face.Features(
        {"image": hugging_face.Image(), "label": hugging_face.ClassLabel(names=["a", "b"])}
    )
    images = [{"bytes": b"rubbish", "path": "there.png"}, None]
    data = hugging_face.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
    data.save_to_disk(tmp_path / "set")
    loaded = load_dataset(f"hf:{tmp_path / 'set'}", "all")
    with pytest.raises(DataError, match=r"cannot read image 0 of hf:.*\(there.png\)"):
        loaded[0]
    with pytest.raises(DataError, match=r"image 1 of hf:.* is missing"):
        loaded[1]


def test_hub_names_carry_the_configuration(hugging_face, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load(name: str, config: str | None):
        asked.append((name, config))
        if name == "no/such":
            raise hugging_face.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist\nmore")
        if name == "no/rows":
            return {"train": table(hugging_face, 0), "test": table(hugging_face, 0)}
        return {"train": table(hugging_face)}

    monkeypatch.setattr(hugging_face, "load_dataset", load)
    load_dataset("hf:org/name:config")
    load_dataset("hf:name")
    assert asked == [("org/name", "config"), ("name", None)]
    with pytest.raises(
        DataError, match=r"cannot load data set 'hf:no/such': Dataset 'no/such' doesn't exist$"
    ):
        load_dataset("hf:no/such")
    with pytest.raises(DataError, match="data set 'hf:no/rows' is empty"):
        load_dataset("hf:no/rows")


def test_hugging_face_missing_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"kdfast\[hub\]"):
        load_dataset("hf:cifar10")


# What they share


def test_arguments_out_of_range(folder: Path) -> None:
    with pytest.raises(ValueError, match="split is one of train, val, test, all, got 'dev'"):
        load_dataset("digits", "dev")
    with pytest.raises(ValueError, match="image_size is at least 1, got 0"):
        load_dataset("digits", image_size=0)
    with pytest.raises(ValueError, match="label_column is for hf:"):
        load_dataset("digits", label_column="label")
    with pytest.raises(DataError, match=r"no data set or folder 'digit' \(did you mean 'digits'\?\)"):
        load_dataset("digit")
    with pytest.raises(DataError, match="no data set or folder '/no/such'; accepted"):
        load_dataset("/no/such")
    with pytest.raises(DataError, match="has 3 classes, expected 10"):
        load_dataset(folder, num_classes=10)
    assert load_dataset(folder, num_classes=3).num_classes == 3


def test_to_memory(folder: Path) -> None:
    data = load_dataset(folder, "all")
    kept = to_memory(data)
    assert isinstance(kept, InMemoryImages)
    assert to_memory(kept) is kept
    assert (kept.classes, len(kept)) == (data.classes, 16)
    assert all(torch.equal(kept[i][0], data[i][0]) and kept[i][1] == data[i][1] for i in range(16))
    save(folder / "ant" / "zebra.png", size=(9, 9))
    with pytest.raises(
        DataError, match=r"different sizes \(\(4, 6\) and \(9, 9\)\); load it with an image_size"
    ):
        to_memory(load_dataset(folder, "all"))


@given(st.lists(st.integers(0, 5), max_size=80))
def test_hold_out_partitions_every_class(values: list[int]) -> None:
    labels = torch.tensor(values, dtype=torch.int64)
    train, test = hold_out(labels)
    assert torch.cat((train, test)).sort().values.tolist() == list(range(len(labels)))
    for label in set(values):
        count, held = values.count(label), int((labels[test] == label).sum())
        assert held == (0 if count == 1 else max(1, round(0.2 * count)))


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("L", 200, (200, 200, 200)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("I;16", 51_200, (200, 200, 200)),
        ("I;16", 65_535, (255, 255, 255)),
        ("I", 70_000, (255, 255, 255)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_every_pillow_mode_becomes_rgb(mode: str, pixel: object, expected: tuple[int, ...]) -> None:
    image = rgb_tensor(Image.new(mode, (2, 2), pixel), None)
    assert image.shape == (3, 2, 2)
    assert tuple(image[:, 0, 0].tolist()) == expected
