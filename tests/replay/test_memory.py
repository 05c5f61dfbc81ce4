"""Memory over a million operations on a replay buffer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kdfast.replay import PrioritizedReplayBuffer
from tests.support.memory import MIB, assert_flat

OPERATIONS = 1_000_000
STEP = 100_000


def operations(buffer: PrioritizedReplayBuffer, count: int, step: int) -> Iterator[int]:
    """Rows that come, are drawn, scored, let go of and looked at; one call is one operation."""
    torch.manual_seed(0)
    rows, labels = torch.randint(0, 256, (16, 3, 2, 2), dtype=torch.uint8), torch.arange(16) % 5
    for done in range(0, count, 10):
        buffer.extend(rows, labels, torch.rand(16))
        for _ in range(4):
            batch = buffer.sample(16, normalize=(done / count, 0.5))  # a pair that was never seen
            buffer.update_priority(batch.index, torch.rand(16), batch.generation)
        if done % 100:
            buffer.remove(batch.index[:4])
        else:
            buffer.state_dict()
        if (done + 10) % step == 0:
            yield done + 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("eviction", ["fifo", "lowest", "class_balanced"])
def test_memory_stays_flat_over_a_million_operations(eviction: str) -> None:
    buffer = PrioritizedReplayBuffer(5000, (3, 2, 2), eviction=eviction, num_classes=5)
    work = operations(buffer, OPERATIONS, STEP)
    assert_flat(work, settled=STEP, room=8 * MIB, what=f"operations, {eviction}")
