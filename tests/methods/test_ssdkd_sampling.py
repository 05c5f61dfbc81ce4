"""φ in the priorities, and the buffer as a set of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.data import ShardLoader, read_manifest
from kdfast.errors import ShardError
from kdfast.functional import kd_statistics
from kdfast.methods.ssdkd.shards import write_shards
from kdfast.replay import PrioritizedReplayBuffer, modulation
from tests.support.ssdkd import method


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize(
    ("values", "gamma", "counted"),
    [({}, 2.0, True), ({"diversity": False}, 2.0, False), ({"difficulty": False}, 0.0, True)],
)
def test_a_modulated_priority_is_phi_times_the_divergence(
    pixels: bool, values: dict[str, Any], gamma: float, counted: bool
) -> None:
    made = method(pixels=pixels, sampling="modulated", **values)
    made.synthesize()
    torch.manual_seed(0)
    shape = (5, made.num_classes, 3, 2) if pixels else (5, made.num_classes)
    student, teacher = torch.randn(shape), torch.randn(shape)
    scores = kd_statistics(student, teacher, dim=1)
    counts = made.contents.class_counts()
    assert int(counts.sum()) == 6 * (64 if pixels else 1)
    probability, predicted = teacher.softmax(1).max(1)
    used = counts if counted else torch.zeros_like(counts)
    phi = modulation(probability, predicted, used, int(used.sum()), gamma)
    kl = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)
    expected = phi * kl
    torch.testing.assert_close(made._deltas(scores), expected.mean((1, 2)) if pixels else expected)
    plain = method(pixels=pixels)
    torch.testing.assert_close(plain._deltas(scores), kl.mean((1, 2)) if pixels else kl)


def test_modulated_priorities_reach_the_buffer() -> None:
    made = method(sampling="modulated", batch_size=4)
    while not made.ready:
        made.synthesize()
    assert made.buffer is not None
    before = made.buffer.state_dict()["delta"].clone()
    made.step().backward()
    drawn = made.buffer.state_dict()["delta"] != before
    assert 1 <= int(drawn.sum()) <= 4
    assert float(made.parts["priority"]) < float(made.parts["kl"]) * float(made.parts["importance"]) * 1.01


@pytest.mark.parametrize("pixels", [False, True])
def test_the_buffer_is_a_set_for_other_students(pixels: bool, tmp_path: Path) -> None:
    made = method(pixels=pixels)
    with pytest.raises(ValueError, match=r"export_shards: there are no images; call synthesize\(\) first"):
        made.export_shards(tmp_path / "none")
    for _ in range(3):  # of a buffer of twelve the first six are gone
        made.synthesize()
    assert made.buffer is not None
    state = made.buffer.state_dict()
    assert made.export_shards(tmp_path / "set", samples_per_shard=5) == 12
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.num_classes, manifest.metadata["source"]) == (made.num_classes, "ssdkd")
    loader = ShardLoader(tmp_path / "set", 12, shuffle=False, loader="torch")
    images, labels = next(iter(loader))
    assert torch.equal((images * 255).round().to(torch.uint8), state["rows"])
    assert torch.equal(labels, state["labels"].long())
    with pytest.raises(ShardError):
        made.export_shards(tmp_path / "set")


def test_without_a_buffer_there_is_no_set(tmp_path: Path) -> None:
    made = method(replay=False, generator="persistent", diversity=False, sampling="uniform")
    made.synthesize()
    with pytest.raises(ValueError, match="with replay"):
        made.export_shards(tmp_path)


@pytest.mark.parametrize("channels", [1, 2])
def test_grey_images_get_three_channels_and_two_are_refused(channels: int, tmp_path: Path) -> None:
    buffer = PrioritizedReplayBuffer(3, (channels, 4, 4), num_classes=2)
    rows = torch.randint(256, (2, channels, 4, 4), dtype=torch.uint8)
    buffer.extend(rows, torch.tensor([1, 0]))
    if channels == 2:
        with pytest.raises(ValueError, match="images have 2 channels, accepted: 1 or 3"):
            write_shards(buffer, tmp_path / "set", image_format="png")
        return
    assert write_shards(buffer, tmp_path / "set", image_format="png") == 2
    images, labels = next(iter(ShardLoader(tmp_path / "set", 2, shuffle=False, loader="torch")))
    assert torch.equal((images * 255).round().to(torch.uint8), rows.expand(-1, 3, -1, -1))
    assert labels.tolist() == [1, 0]
