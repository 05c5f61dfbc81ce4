"""Prioritized replay against cpprb and against bare copies of the same rows, one thread, in one run.

A step is sample + update of 256 rows. Bytes a step with rows of R bytes: 2·256·R for the copies; the tree adds
about 256·(1.1 KB) of leaves and sums, mostly from cache. `memcpy` copies 256 random rows and does nothing else: what
no buffer with rows can beat by much. Timings on a shared or frequency-scaled machine mean nothing: compare providers
within one run, and look at the spread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kdfast.replay import PrioritizedReplayBuffer

BATCH = 256
IMAGE = (3, 32, 32)

Step = Callable[[], Any]


def kdfast_step(capacity: int, shape: tuple[int, ...], device: str = "cpu") -> Step:
    buffer = PrioritizedReplayBuffer(capacity, shape, device=device)
    chunk = min(capacity, 10_000)
    for _ in range(capacity // chunk):
        rows = torch.randint(0, 256, (chunk, *shape), dtype=torch.uint8)
        buffer.extend(rows, priorities=torch.rand(chunk))
    priority = torch.rand(BATCH, device=device)

    def step() -> torch.Tensor:
        batch = buffer.sample(BATCH)
        buffer.update_priority(batch.index, priority, batch.generation)
        return batch.samples

    return step


def cpprb_step(capacity: int, shape: tuple[int, ...]) -> Step:
    cpprb = pytest.importorskip("cpprb")
    fields = {"row": {"shape": shape or 1, "dtype": np.uint8}}
    buffer = cpprb.PrioritizedReplayBuffer(capacity, fields, alpha=0.6)
    chunk = min(capacity, 10_000)
    for _ in range(capacity // chunk):
        rows = np.random.randint(0, 256, (chunk, *shape), dtype=np.uint8)
        buffer.add(row=rows, priorities=np.random.rand(chunk))
    priority = np.random.rand(BATCH)

    def step() -> Any:
        batch = buffer.sample(BATCH, beta=0.4)
        buffer.update_priorities(batch["indexes"], priority)
        return batch["row"]

    return step


def memcpy_step(capacity: int, shape: tuple[int, ...]) -> Step:
    rows = np.random.randint(0, 256, (capacity, *shape), dtype=np.uint8)
    out = np.empty((BATCH, *shape), np.uint8)
    # Drawn ahead, in turns: the copies alone are timed, and no row is in the cache from the turn before.
    turns = iter(np.tile(np.random.randint(0, capacity, (500, BATCH)), (10_000, 1)))
    return lambda: np.take(rows, next(turns), axis=0, out=out, mode="clip")


PROVIDERS = {"kdfast": kdfast_step, "cpprb": cpprb_step, "memcpy": memcpy_step}
# 5000: SSD-KD's buffer; 50k: CIFAR's training set.
SIZES = [5_000, 50_000]


@pytest.mark.parametrize("capacity", SIZES)
@pytest.mark.parametrize("shape", [(), IMAGE], ids=["scalar", "images"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_step(benchmark: Any, provider: str, shape: tuple[int, ...], capacity: int) -> None:
    torch.set_num_threads(1)
    benchmark.group = f"sample + update of {BATCH} in {capacity} {'images' if shape else 'scalars'}"
    step = PROVIDERS[provider](capacity, shape)
    assert tuple(step().shape[1:]) in (shape, (*shape, 1))
    benchmark(step)


@pytest.mark.parametrize("capacity", [5_000, 50_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("operation", ["sample", "update"])
def test_tree(benchmark: Any, operation: str, capacity: int) -> None:
    """The C++ tree alone."""
    from kdfast import _C

    benchmark.group = f"tree alone, {operation} {BATCH}"
    rng = np.random.default_rng(0)
    tree = _C.PriorityTree(capacity)
    tree.set(np.arange(capacity), rng.integers(1, 2**22, capacity, dtype=np.uint32))
    steps = iter(range(10**9))
    if operation == "sample":
        benchmark(lambda: tree.sample(BATCH, seed=0, step=next(steps)))
        return
    index = rng.integers(0, capacity, (500, BATCH))
    quantum = rng.integers(1, 2**22, BATCH, dtype=np.uint32)
    benchmark(lambda: tree.set(index[next(steps) % 500], quantum))


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [5_000, 50_000, 1_000_000])
def test_gpu_step(benchmark: Any, capacity: int) -> None:
    benchmark.group = f"GPU, sample + update of {BATCH} in {capacity} images"
    step = kdfast_step(capacity, IMAGE, "cuda")

    def synchronised() -> None:
        step()
        torch.cuda.synchronize()

    synchronised()
    benchmark(synchronised)
