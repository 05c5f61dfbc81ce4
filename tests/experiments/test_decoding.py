"""Where a recipe's images are decoded, how often, and that nothing else depends on it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kdfast.data import load_dataset
from kdfast.data.labelled import LabelledImages
from kdfast.errors import DataError
from kdfast.experiments.common import decoding
from kdfast.experiments.common.decoding import automatic_workers, decoded
from kdfast.experiments.common.image_batches import ImageBatches

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
COUNT = 10


class Counted(LabelledImages):
    """Images whose first pixels say which they are and which process decoded them."""

    def __init__(self, sizes: tuple[int, ...] = (4,) * COUNT) -> None:
        self.source, self.classes, self.sizes = "counted", ("a", "b"), sizes
        self.labels = torch.arange(len(sizes)) % 2
        self.decoded: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.decoded.append(index)
        image = torch.zeros(3, self.sizes[index], 4, dtype=torch.uint8)
        image[0, 0, 0] = index
        image.view(-1)[-8:] = torch.tensor(list(os.getpid().to_bytes(8, "little")))
        return image, int(self.labels[index])


def folder(root: Path, count: int = 6) -> Path:
    """A folder of two classes of small PNG files."""
    for name in "ab":
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.RandomState(index).randint(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def seen(batches: ImageBatches) -> list[tuple[Tensor, Tensor]]:
    return [(images.clone(), labels.clone()) for images, labels in batches]


def pids(batches: list[tuple[Tensor, Tensor]]) -> set[int]:
    rows = torch.cat([images.flatten(1)[:, -8:] for images, _ in batches])
    return {int.from_bytes(bytes((255 * row).round().int().tolist()), "little") for row in rows}


def test_workers_decode_and_not_this_process() -> None:
    dataset = Counted()
    found = seen(ImageBatches(dataset, 4, workers=2, shuffle=False, **PLAIN))
    assert os.getpid() not in pids(found)
    assert dataset.decoded == []
    here = Counted()
    assert pids(seen(ImageBatches(here, 4, workers=0, shuffle=False, **PLAIN))) == {os.getpid()}


def test_many_images_get_workers_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FEW", COUNT)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    found = seen(ImageBatches(Counted(), 4, shuffle=False, **PLAIN))
    assert os.getpid() not in pids(found)


def test_how_many_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert automatic_workers(10_000, 1) == decoding.MOST_WORKERS
    assert automatic_workers(decoding.FEW - 1, 1) == 0
    assert automatic_workers(10_000, 1 << 60) in (
        0,
        decoding.MOST_WORKERS,
    )  # not everywhere is shared memory a folder
    monkeypatch.setattr(decoding.Path, "is_dir", lambda self: True)
    monkeypatch.setattr(decoding.shutil, "disk_usage", lambda path: type("", (), {"free": 64 << 20}))
    assert automatic_workers(10_000, 64 << 20) == 0
    assert automatic_workers(10_000, 1 << 10) == decoding.MOST_WORKERS
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert automatic_workers(10_000, 1) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_small_set_is_decoded_once_whoever_reads_it(workers: int) -> None:
    """Training, then evaluation, and again: nothing is decoded after the first pass, and nothing changes."""
    dataset = Counted()
    training = ImageBatches(dataset, 4, workers=workers, seed=3, **PLAIN)
    first = seen(training)
    again = Counted()
    want = seen(ImageBatches(again, 4, workers=0, shuffle=False, **PLAIN))
    dataset.decoded.clear()
    for _ in range(2):
        for (images, labels), (other, same) in zip(
            seen(ImageBatches(dataset, 4, workers=0, shuffle=False, **PLAIN)), want, strict=True
        ):
            assert torch.equal(images[:, 0, 0, 0], other[:, 0, 0, 0])
            assert torch.equal(labels, same)
    training.set_epoch(0)
    for one, two in zip(first, seen(training), strict=True):
        assert all(map(torch.equal, one, two))
    assert dataset.decoded == []


def test_a_large_set_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * 4 * 4 + 8
    for limit, times in ((COUNT * size, 1), (COUNT * size - 1, 2)):
        monkeypatch.setattr(decoding, "KEPT_BYTES", limit)
        dataset = Counted()
        batches = ImageBatches(dataset, 4, workers=0, shuffle=False, **PLAIN)
        for _ in range(2):
            seen(batches)
        assert len(dataset.decoded) == times * COUNT


def test_images_of_several_sizes_are_not_kept() -> None:
    dataset = Counted((4, 4, 5, 5, 4, 4))
    batches = ImageBatches(dataset, 2, workers=0, shuffle=False, **PLAIN)
    for _ in range(2):
        assert [len(images[0, 0]) for images, _ in seen(batches)] == [4, 5, 4]


def test_an_abandoned_pass_is_no_harm() -> None:
    dataset = Counted()
    batches = ImageBatches(dataset, 4, workers=0, shuffle=False, **PLAIN)
    for _ in batches:
        break
    assert [int(255 * image[0, 0, 0]) for images, _ in seen(batches) for image in images] == list(
        range(COUNT)
    )
    assert sorted(dataset.decoded) == list(range(COUNT))


def test_what_was_decoded_goes_with_its_data_set() -> None:
    dataset = Counted()
    seen(ImageBatches(dataset, 4, workers=0, **PLAIN))
    assert decoded(dataset) is decoded(dataset)
    assert decoded(dataset) is not decoded(Counted())
    before = len(decoding._all)
    del dataset
    assert len(decoding._all) < before


def test_decoding_draws_nothing_from_the_networks_generator() -> None:
    """A resumed run has to decode what the first one had kept: dropout must not notice."""
    dataset = Counted()
    torch.manual_seed(0)
    want = torch.rand(3)
    for workers in (0, 1):
        torch.manual_seed(0)
        seen(ImageBatches(Counted() if workers else dataset, 4, workers=workers, **PLAIN))
        assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_and_nothing_else_said(tmp_path: Path, workers: int) -> None:
    root = folder(tmp_path / "set")
    (root / "b" / "3.png").write_bytes(b"no image")
    batches = ImageBatches(load_dataset(root, image_size=8), 4, workers=workers, **PLAIN)
    with pytest.raises(DataError, match=r"^cannot read image .*3\.png") as caught:
        seen(batches)
    assert "Traceback" not in str(caught.value)


def test_data_sets_can_be_sent_to_a_process_that_is_started_anew(tmp_path: Path) -> None:
    """Where processes are not forked (macOS, Windows, Python from 3.14) the data set is pickled."""
    dataset = load_dataset(folder(tmp_path / "set"), image_size=8)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3][0], dataset[3][0])
