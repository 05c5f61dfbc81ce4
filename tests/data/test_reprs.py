"""What a notebook shows of kdfast's objects says what they are."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from kdfast.data import ShardLoader, ShardWriter, load_dataset
from kdfast.methods import DMKD, DMKDConfig
from kdfast.replay import PrioritizedReplayBuffer
from tests.data.test_splits import classes_of


def test_sets_say_where_they_are_from_and_what_was_held_out(tmp_path: Path) -> None:
    root = classes_of(tmp_path, 10)
    assert repr(load_dataset(root)) == f"ImageFolder('{root}': 20 images, 2 classes: a, b)"
    assert repr(load_dataset(root, "test")).endswith("test is 4 of its 20 images)")


def test_a_loader_says_what_it_holds_and_where_it_is(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, num_classes=3) as writer:
        writer.write(torch.zeros(6, 3, 8, 10, dtype=torch.uint8), torch.arange(6) % 3)
    with ShardLoader(tmp_path, 2, loader="torch", image_size=8) as loader:
        assert (
            "6 images, 3 classes, sides 8 to 8; 3 batches an epoch on cpu, next: batch 0 of epoch 0"
            in repr(loader)
        )
        next(iter(loader))
        assert "next: batch 1 of epoch 0" in repr(loader)


def test_methods_say_who_learns_from_whom() -> None:
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2).eval().requires_grad_(False)
    assert repr(DMKD(student, teacher, config=DMKDConfig(temperature=4.0))).startswith(
        "DMKD(student=Linear of 8 parameters, teacher=Linear of 8 parameters, DMKDConfig(temperature=4.0"
    )
    assert repr(DMKD()).startswith("DMKD(DMKDConfig(temperature=10.0")


def test_a_buffer_says_how_full_it_is() -> None:
    buffer = PrioritizedReplayBuffer(8, (3, 4, 4), num_classes=2)
    buffer.extend(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 1]))
    assert "8" in repr(buffer)
    assert "3" in repr(buffer)
