"""`kdfast export SET --to folder|webdataset`: what other tools read is what is in the set."""

from __future__ import annotations

import io
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from kdfast.cli.app import app
from kdfast.data import ShardLoader, ShardWriter, check_shards, load_dataset
from kdfast.data.records import ShardRecords
from kdfast.errors import ShardError
from tests.support.shards import good, jpeg, numbered, numbers, tar

datasets = pytest.importorskip("datasets")
CLASSES = ("ant", "bee", "cow", "dog")
LABELS = torch.tensor([3, 0, 0, 1, 3, 3, 0, 1, 1, 0])  # class 2 has no image


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with ShardWriter(
        tmp_path / "set",
        samples_per_shard=4,
        image_format="png",
        num_classes=4,
        metadata={"classes": list(CLASSES)},
    ) as writer:
        writer.write(numbered(10), LABELS)
    return tmp_path / "set"


def export(made: Path, to: str, *words: str) -> Result:
    return CliRunner().invoke(app, ["export", str(made), "--to", to, *words])


def exported(made: Path, to: str) -> Path:
    out = made.parent / to
    result = export(made, to, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "images   10" in result.output
    return out


def number_in(image: Image.Image) -> int:
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    return numbers(pixels)[0]


def test_a_folder_is_read_by_us_and_by_others(made: Path) -> None:
    out = exported(made, "folder")
    assert sorted(path.name for path in out.iterdir()) == ["ant", "bee", "dog"]
    ours = load_dataset(out)
    found = {number_in(Image.open(path)): path.parent.name for path in out.rglob("*.png")}
    assert found == {at: CLASSES[label] for at, label in enumerate(LABELS.tolist())}
    assert len(ours) == 10
    theirs = datasets.load_dataset("imagefolder", data_dir=str(out), split="train")
    names = theirs.features["label"].names
    assert {number_in(row["image"]): names[row["label"]] for row in theirs} == found


def test_webdataset_has_labels_that_others_read(made: Path) -> None:
    out = exported(made, "webdataset")
    assert sorted(path.name for path in out.iterdir()) == [
        f"{n:06d}.{kind}" for n in range(3) for kind in ("idx", "tar")
    ]
    tars = sorted(map(str, out.glob("*.tar")))
    theirs = datasets.load_dataset("webdataset", data_files=tars, split="train")
    assert [(number_in(row["png"]), row["cls"]) for row in theirs] == list(enumerate(LABELS.tolist()))
    # WebDataset's own convention, to_tuple("png", "cls"): files of one key stand together, the label in digits.
    with tarfile.open(tars[0]) as archive:
        held = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert list(held)[:2] == ["000000000.png", "000000000.cls"]
    assert held["000000000.cls"] == b"3"
    assert number_in(Image.open(io.BytesIO(held["000000001.png"]))) == 1


def test_webdatasets_of_others_train_students(made: Path) -> None:
    out = exported(made, "webdataset")
    with ShardLoader(out, 10, shuffle=False, loader="torch") as loader:
        images, labels = next(iter(loader))
    assert numbers(images) == list(range(10))
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("written", [b"", b"seven", b"-1", b"3.0", b"4294967296", b"1" * 40])
def test_labels_in_digits_that_are_none(tmp_path: Path, written: bytes) -> None:
    tar(tmp_path / "a.tar", [("0.jpg", jpeg()), ("0.cls", written), ("1.jpg", jpeg()), ("1.cls", b" 7\n")])
    with pytest.raises(ShardError, match=r"its label \(\.cls\) is no number from 0 to 2147483647 in digits"):
        check_shards(tmp_path)
    assert check_shards(tmp_path, on_error="skip").label.tolist() == [7]


def test_our_own_label_goes_before_digits(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", [*good(1), ("000.cls", b"5")])
    assert check_shards(tmp_path).label.tolist() == [0]


def test_names_that_are_no_folders_go_by_number(made: Path) -> None:
    for number, names in enumerate((["a/b", "c", "d", "e"], ["A", "a", "b", "c"], ["..", "b", "c", "d"])):
        with ShardWriter(made.parent / f"s{number}", num_classes=4, metadata={"classes": names}) as writer:
            writer.write(numbered(4), torch.arange(4))
        out = made.parent / f"o{number}"
        assert export(made.parent / f"s{number}", "folder", "--out", str(out)).exit_code == 0
        assert sorted(path.name for path in out.iterdir()) == ["0", "1", "2", "3"]
    with closing(ShardRecords(made.parent / "s0")) as records:
        assert (out / "2" / "000000002.jpg").read_bytes() == records.stored([2])[0]


def test_refusals(made: Path, tmp_path: Path) -> None:
    def refused(*words: str, run: Path = made) -> str:
        result = CliRunner().invoke(app, ["export", str(run), *words])
        assert result.exit_code == 2, result.output
        return " ".join(result.output.split())

    assert "--to: got onnx for" in refused("--to", "onnx")
    assert "a set of shards; accepted: folder, webdataset" in refused("--to", "onnx")
    assert "--out: missing" in refused("--to", "folder")
    assert "which is no set of shards" in refused("--to", "folder", "--out", "x", run=tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "holds something already" in refused("--to", "folder", "--out", str(tmp_path / "full"))
