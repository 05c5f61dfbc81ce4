"""Measuring: accuracy and mean IoU against counting by hand; the batches that feed it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdfast.data.datasets import InMemoryImages, LabelledImages
from kdfast.errors import DataError
from kdfast.experiments.common.augmentation import Augmentation, resized_crop
from kdfast.experiments.common.held_out import channel_statistics
from kdfast.experiments.common.image_batches import ImageBatches
from kdfast.training import MetricsLog, evaluate_classification, evaluate_segmentation, read_metrics


class Table(nn.Module):
    """Looks its outputs up by the image's first pixel."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.outputs[images[:, 0, 0, 0].long()]


def numbered(count: int, size: int = 1) -> torch.Tensor:
    return torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def test_top_one_and_top_five_are_what_counting_says() -> None:
    logits = torch.randn(40, 8)
    labels = torch.randint(8, (40,))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    batches = [(numbered(40)[i : i + 16], labels[i : i + 16]) for i in range(0, 40, 16)]
    model = Table(logits).train()
    metrics = evaluate_classification(model, batches, num_classes=8)
    assert metrics["accuracy"] == pytest.approx(float((ranks < 1).float().mean()))
    assert metrics["top5_accuracy"] == pytest.approx(float((ranks < 5).float().mean()))
    assert model.training
    assert set(evaluate_classification(model, [(numbered(3), labels[:3] % 5)], num_classes=5)) == {"accuracy"}


def test_mean_iou_is_what_counting_says() -> None:
    predicted = torch.randint(0, 4, (5, 6, 6))
    predicted[predicted == 2] = 0
    masks = torch.randint(0, 2, (5, 6, 6))  # class 2 nowhere, class 3 only predicted
    masks[torch.rand(5, 6, 6) < 0.2] = 255
    counted = masks != 255
    ious = [
        float(((predicted == c) & (masks == c)).sum())
        / float((((predicted == c) | (masks == c)) & counted).sum())
        for c in (0, 1, 3)
    ]
    outputs = nn.functional.one_hot(predicted, 4).permute(0, 3, 1, 2).float()
    batches = [(numbered(5)[i : i + 2], masks[i : i + 2]) for i in range(0, 5, 2)]
    model = Table(outputs)
    metrics = evaluate_segmentation(model, batches, num_classes=4)
    assert metrics["miou"] == pytest.approx(sum(ious) / 3)
    assert metrics["pixel_accuracy"] == pytest.approx(float((predicted == masks)[counted].float().mean()))


def test_smaller_outputs_are_resized_to_the_masks() -> None:
    outputs = torch.zeros(1, 2, 2, 2)
    outputs[:, 1] = 1.0
    metrics = evaluate_segmentation(
        Table(outputs), [(numbered(1), torch.ones(1, 8, 8).long())], num_classes=2
    )
    assert metrics == {"miou": 1.0, "pixel_accuracy": 1.0}


def test_labels_beyond_the_classes_and_empty_data_are_refused() -> None:
    model = Table(torch.zeros(4, 3))
    for label in (3, -1):
        with pytest.raises(DataError, match="accepted: 0…2"):
            evaluate_classification(model, [(numbered(1), torch.tensor([label]))], num_classes=3)
    with pytest.raises(DataError, match="held no images"):
        evaluate_classification(model, [], num_classes=3)


def digits(count: int = 10) -> InMemoryImages:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    return InMemoryImages(images, torch.arange(count), tuple(map(str, range(count))), "numbers")


class OnDisk(LabelledImages):
    """The same images, one at a time."""

    def __init__(self) -> None:
        inner = digits()
        self.inner, self.labels, self.classes, self.source = inner, inner.labels, inner.classes, "disk"

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.inner[index]


PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}


@pytest.mark.parametrize("dataset", [digits(), OnDisk()], ids=["memory", "disk"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_is_measured_once_over_all_ranks(dataset: LabelledImages, world: int) -> None:
    seen: Counter[int] = Counter()
    for rank in range(world):
        batches = ImageBatches(dataset, 3, shuffle=False, rank=rank, world_size=world, **PLAIN)
        pairs = list(batches)
        assert len(pairs) == len(batches)
        for images, labels in pairs:
            torch.testing.assert_close(images[:, 0, 0, 0], labels.float())
            seen.update(labels.tolist())
    assert seen == Counter(range(10))


def test_shuffled_batches_are_full_follow_the_epoch_and_go_on_where_they_stopped() -> None:
    def labels(batches: ImageBatches) -> list[list[int]]:
        return [batch[1].tolist() for batch in batches]

    batches = ImageBatches(digits(), 4, seed=5, **PLAIN)
    first, second = labels(batches), labels(batches)
    assert [len(batch) for batch in first] == [4, 4, 4]
    assert {label for batch in first for label in batch} == set(range(10))
    assert first != second
    batches.set_epoch(0)
    assert labels(batches) == first
    iterator = iter(batches)
    next(iterator)
    again = ImageBatches(digits(), 4, seed=5, **PLAIN)
    again.load_state_dict(batches.state_dict())
    assert labels(again) == second[1:]
    assert labels(ImageBatches(digits(), 4, seed=6, **PLAIN)) != first


def test_augmentation_depends_on_seed_epoch_and_batch_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (8, 3, 9, 9), dtype=torch.uint8, generator=rng)
    dataset = InMemoryImages(images, torch.arange(8), tuple("abcdefgh"), "random")
    augment = Augmentation(("crop", "flip", "resized_crop"), 6)
    runs = []
    for _ in range(2):
        torch.rand(5)  # the global generator has no say
        batches = ImageBatches(dataset, 4, augment=augment, seed=1, **PLAIN)
        runs.append([batch[0] for epoch in range(2) for batch in batches])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][0].shape == (4, 3, 6, 6)
    assert not torch.equal(runs[0][0], runs[0][2])


def test_resized_crop_keeps_to_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 64).expand(500, 1, 64, 64)
    cut = resized_crop(ramp, 16, generator)
    low, high = cut.amin((1, 2, 3)), cut.amax((1, 2, 3))
    assert float(low.min()) >= 0
    assert float(high.max()) <= 1
    # Of a ramp, what a cut spans is its width: between √(0.08 · 3/4) and all, less half a pixel on either side.
    width = (high - low) * 16 / 15
    assert 0.2 < float(width.min()) < 0.45
    assert 0.9 < float(width.max()) <= 1.1
    assert torch.equal(resized_crop(ramp, 16, torch.Generator().manual_seed(0)), cut)


def test_channel_statistics_are_numpys_and_flat_channels_are_harmless() -> None:
    images = torch.randint(0, 255, (5, 3, 4, 4), dtype=torch.uint8)
    images[:, 2] = 7
    mean, std = channel_statistics(images)
    values = images.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255
    np.testing.assert_allclose(mean, values.mean(1), atol=1e-6)
    np.testing.assert_allclose(std[:2], values[:2].std(1, ddof=1), atol=1e-6)
    assert std[2] == 1.0


def test_a_log_with_a_broken_line_is_named(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write("train", 1, loss=0.5)
    log.close()
    (tmp_path / "m.jsonl").write_text("x\n" + (tmp_path / "m.jsonl").read_text())
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_metrics(tmp_path / "m.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path / "none")
