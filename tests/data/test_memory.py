"""Memory over a hundred thousand images, written and read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdfast.data import ShardLoader, ShardWriter
from tests.support.memory import MIB, assert_flat
from tests.support.shards import numbered

IMAGES = 100_000
STEP = 10_000


def written(folder: Path) -> Iterator[int]:
    with ShardWriter(folder, samples_per_shard=1000, num_classes=10, image_format="png") as writer:
        for done in range(0, IMAGES, 500):
            writer.write(numbered(500), torch.arange(500) % 10)
            if (done + 500) % STEP == 0:
                yield done + 500


def read(loader: ShardLoader) -> Iterator[int]:
    """As a training run does: epochs of augmented batches, and its place in a state now and then."""
    done, next_yield = 0, STEP
    while done < IMAGES:
        for images, labels in loader:
            assert images.shape[1:] == (3, 8, 8)
            done += len(labels)
            if done >= next_yield:
                loader.state_dict()
                next_yield += STEP
                yield done
            if done >= IMAGES:
                return


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat_over_a_hundred_thousand_images_written(tmp_path: Path) -> None:
    # Of every image stays its row in the manifest's shard, of every shard an entry.
    assert_flat(written(tmp_path), settled=2 * STEP, room=16 * MIB, what="written")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_memory_stays_flat_over_a_hundred_thousand_images_read(tmp_path: Path, kind: str) -> None:
    with ShardWriter(tmp_path, samples_per_shard=500, num_classes=10, image_format="png") as writer:
        for _ in range(20):
            writer.write(numbered(500), torch.arange(500) % 10)
    with ShardLoader(
        tmp_path, 250, loader=kind, augment="standard", num_workers=1 if kind == "dali" else 0
    ) as loader:
        assert_flat(read(loader), settled=2 * STEP, room=16 * MIB, what=f"read by {kind}")
