"""Prioritized replay of images: draw a batch with its rows and weights, re-score it, insert new rows.

All buffers hold the same rows with the same priorities at α = 0.6, β = 0.4. Weights are normalised differently
(cpprb and torchrl by their largest), so the check compares them relative to each other: w_i ∝ p_i^−β.

Rows are images, and scalars: what is left when there is nothing to copy. "memcpy of the rows" is no buffer: it copies
as many random rows in C (``numpy.take`` into memory that is there) and does nothing else, which is what a draw on a
CPU cannot beat. The tree alone is timed by itself, where its C++ is what a GPU buffer does not use.

Traffic of kdfast's draw on a GPU, a drawn row of R bytes: 2R for the row, 4.6 KB of descent at three levels (2.3 at
two), 48 for what describes it. Other buffers were not counted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch

from kdfast.benchmarks.case import Absent, Case, Provider, Settings, Traffic, Work, peer
from kdfast.replay import PrioritizedReplayBuffer

ALPHA, BETA, EPS = 0.6, 0.4, 1e-6
IMAGE, SCALAR = (3, 32, 32), ()


class Buffer(NamedTuple):
    """A library's buffer, as this suite drives it.

    Attributes:
        sample: Draws; returns rows, slots and weights.
        update: Re-scores slots (as ``sample`` returned them) with priorities on the suite's device.
        extend: Inserts rows that are on the suite's device.
    """

    sample: Callable[[], tuple[Any, Any, Any]]
    update: Callable[[Any, torch.Tensor], Any]
    extend: Callable[[torch.Tensor], Any]


class _Inputs:
    """What every buffer is filled with, and what it is updated with."""

    def __init__(self, capacity: int, batch: int, row: tuple[int, ...], settings: Settings) -> None:
        self.capacity, self.batch, self.row, self.device = capacity, batch, row, settings.device
        self.turns = 8

    @cached_property
    def rows(self) -> torch.Tensor:
        """uint8 ``[capacity, *row]``, on the CPU."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (self.capacity, *self.row), generator=generator, dtype=torch.uint8)

    @cached_property
    def priority(self) -> torch.Tensor:
        """float32 ``[capacity]``, on the CPU. An update gives a slot its own again, so that the check holds."""
        return torch.rand(self.capacity, generator=torch.Generator().manual_seed(1)) + 0.01

    @cached_property
    def fresh(self) -> list[torch.Tensor]:
        """A batch of rows to insert for each turn."""
        return [self.rows[: self.batch].to(self.device, copy=True) for _ in range(self.turns)]

    def on_device(self, name: str) -> torch.Tensor:
        value: torch.Tensor = getattr(self, name).to(self.device)
        return value


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    sizes = settings.pick([(512, 16)], [(50_000, 256)], [(50_000, 256), (500_000, 1024)])
    for capacity, batch in sizes:
        inputs = _Inputs(capacity, batch, IMAGE, settings)
        for name in ("sample", "update", "sample and update", "extend"):
            yield _case(name, inputs, settings)
        inputs = _Inputs(capacity, batch, SCALAR, settings)
        for name in ("sample", "update", "sample and update"):
            yield _case(name, inputs, settings)
    if settings.device == "cpu":
        for capacity in settings.pick(
            [512], [5000, 50_000, 1_000_000], [5000, 50_000, 1_000_000, 10_000_000]
        ):
            for name in ("tree alone, sample", "tree alone, update"):
                yield _tree_case(name, capacity, 256)


def _case(name: str, inputs: _Inputs, settings: Settings) -> Case:
    def built(make: Callable[[_Inputs], Buffer]) -> Callable[[], Work]:
        return lambda: _work(name, make(inputs), inputs)

    def check(provider: str, result: Any) -> None:
        if name in ("sample", "sample and update"):
            _check(inputs, *result)

    on_gpu = settings.device == "cuda"
    row_bytes = int(np.prod(inputs.row))
    levels = 2 if inputs.capacity <= 1 << 16 else 3
    descent = 256 * (8 * (levels - 1) + 4)
    drawn = Traffic("2R + descent + 48", inputs.batch * (2 * row_bytes + descent + 48))
    providers: tuple[Provider, ...] = (
        Provider("torch.multinomial", built(_multinomial), graph=name == "sample"),
        Provider(
            "cpprb", built(_cpprb), graph=False, config="on the CPU, rows copied over" if on_gpu else ""
        ),
        Provider("torchrl", built(_torchrl), graph=False),
        Provider("kdfast", built(_ours), drawn if on_gpu and name == "sample" else None),
    )
    if name == "sample and update" and not on_gpu:
        providers = (Provider("memcpy of the rows", lambda: _memcpy(inputs), against=""), *providers)
    row = "x".join(map(str, inputs.row)) + " uint8" if inputs.row else "scalar"
    params = {"capacity": inputs.capacity, "batch": inputs.batch, "row": row}
    return Case("replay", name, params, inputs.turns, providers, check, inputs.batch, "rows", family="replay")


def _work(name: str, buffer: Buffer, inputs: _Inputs) -> Work:
    if name == "sample":
        return lambda turn: buffer.sample()
    if name == "extend":
        return lambda turn: buffer.extend(inputs.fresh[turn % inputs.turns])
    if name == "update":
        drawn = [buffer.sample() for _ in range(inputs.turns)]
        scores = [_scores(inputs, index) for _, index, _ in drawn]

        def update(turn: int) -> None:
            buffer.update(drawn[turn % inputs.turns][1], scores[turn % inputs.turns])

        return update
    priority = inputs.on_device("priority")

    def both(turn: int) -> tuple[Any, Any, Any]:
        rows, index, weight = buffer.sample()
        buffer.update(index, priority[_slots(index).to(priority.device)])
        return rows, index, weight

    return both


def _scores(inputs: _Inputs, index: Any) -> torch.Tensor:
    return inputs.priority[_slots(index).cpu()].to(inputs.device)


def _slots(index: Any) -> torch.Tensor:
    """As int64: cpprb counts in uint64, which torch does not index with."""
    return index if isinstance(index, torch.Tensor) else torch.from_numpy(np.asarray(index).astype(np.int64))


def _check(inputs: _Inputs, rows: Any, index: Any, weight: Any) -> None:
    index = _slots(index).cpu().long().flatten()
    weight = torch.as_tensor(weight).cpu().double().flatten()
    rows = torch.as_tensor(rows).cpu().reshape(inputs.batch, *inputs.row)
    assert len(index) == inputs.batch, f"drew {len(index)} rows, not {inputs.batch}"
    assert torch.equal(rows, inputs.rows[index]), "rows are not those of their slots"
    want = (inputs.priority[index].double() + EPS) ** (-ALPHA * BETA)
    torch.testing.assert_close(weight / weight[0], want / want[0], rtol=1e-3, atol=0)


def _ours(inputs: _Inputs) -> Buffer:
    buffer = PrioritizedReplayBuffer(
        inputs.capacity, inputs.row, alpha=ALPHA, beta=BETA, eps=EPS, device=inputs.device, seed=0
    )
    buffer.extend(inputs.on_device("rows"), priorities=inputs.on_device("priority"))

    def sample() -> tuple[Any, Any, Any]:
        batch = buffer.sample(inputs.batch)
        return batch.samples, batch.index, batch.weight

    return Buffer(sample, buffer.update_priority, buffer.extend)


def _memcpy(inputs: _Inputs) -> Work:
    """The copies of a draw alone, of other random rows each call; the rest of what the check wants stands ready."""
    generator = torch.Generator().manual_seed(2)
    rows, drawn, calls = inputs.rows.numpy(), [], count()
    for _ in range(64):  # as many as no cache holds the rows of
        index = torch.randint(0, inputs.capacity, (inputs.batch,), generator=generator)
        drawn.append((index.numpy(), (inputs.priority[index].double() + EPS) ** (-ALPHA * BETA)))
    out = np.empty((inputs.batch, *inputs.row), dtype=np.uint8)

    def copy(turn: int) -> tuple[Any, Any, Any]:
        index, weight = drawn[next(calls) % len(drawn)]
        rows.take(index, 0, out=out, mode="clip")  # other modes copy once more
        return out, index, weight

    return copy


def _tree_case(name: str, capacity: int, batch: int) -> Case:
    """The priority tree without rows, weights or random torch tensors round it."""
    generator = np.random.default_rng(3)
    quantum = generator.integers(1, 1 << 22, capacity, dtype=np.uint32)
    slots = [generator.integers(0, capacity, batch) for _ in range(8)]

    def ours() -> Work:
        from kdfast._C import PriorityTree

        tree = PriorityTree(capacity)
        tree.set(np.arange(capacity), quantum)
        if name.endswith("sample"):
            return lambda turn: tree.sample(batch, 0, turn)
        return lambda turn: tree.set(slots[turn % 8], quantum[slots[turn % 8]])

    def numpy() -> Work:
        mass = quantum.astype(np.float64)
        if name.endswith("sample"):

            def draw(turn: int) -> Any:
                upto = np.cumsum(mass)
                return np.searchsorted(upto, generator.random(batch) * upto[-1], side="right")

            return draw

        def update(turn: int) -> None:
            mass[slots[turn % 8]] = quantum[slots[turn % 8]]

        return update

    def check(provider: str, result: Any) -> None:
        if name.endswith("sample"):
            assert len(result) == batch
            assert 0 <= int(result.min()) <= int(result.max()) < capacity

    providers = (Provider("numpy cumsum, searchsorted", numpy), Provider("kdfast", ours))
    params = {"capacity": capacity, "batch": batch}
    return Case("replay", name, params, 8, providers, check, batch, "rows", family="replay")


def _multinomial(inputs: _Inputs) -> Buffer:
    """A tensor of masses and ``torch.multinomial``: the buffer that one writes in an afternoon."""
    if inputs.capacity > 1 << 24:
        raise Absent("torch.multinomial takes 2^24 categories at most")
    mass = (inputs.on_device("priority") + EPS) ** ALPHA
    store, head = inputs.on_device("rows").clone(), 0

    def sample() -> tuple[Any, Any, Any]:
        index = torch.multinomial(mass, inputs.batch, replacement=True)
        probability = mass[index] / mass.sum()
        return store[index], index, (inputs.capacity * probability) ** -BETA

    def update(index: torch.Tensor, priority: torch.Tensor) -> None:
        mass[index] = (priority.abs() + EPS) ** ALPHA

    def extend(rows: torch.Tensor) -> None:
        nonlocal head
        if head + len(rows) > inputs.capacity:
            head = 0
        store[head : head + len(rows)] = rows
        mass[head : head + len(rows)] = mass.max()
        head += len(rows)

    return Buffer(sample, update, extend)


def _cpprb(inputs: _Inputs) -> Buffer:
    library = peer("cpprb")
    environment = {"image": {"shape": inputs.row or 1, "dtype": np.uint8}}
    buffer = library.PrioritizedReplayBuffer(inputs.capacity, environment, alpha=ALPHA, eps=EPS)
    buffer.add(image=inputs.rows.numpy(), priorities=inputs.priority.numpy())
    on_gpu = inputs.device == "cuda"

    def sample() -> tuple[Any, Any, Any]:
        batch = buffer.sample(inputs.batch, beta=BETA)
        rows = torch.from_numpy(batch["image"])
        return rows.to(inputs.device) if on_gpu else rows, batch["indexes"], batch["weights"]

    def update(index: Any, priority: torch.Tensor) -> None:
        buffer.update_priorities(index, priority.cpu().numpy())

    def extend(rows: torch.Tensor) -> None:
        buffer.add(image=rows.cpu().numpy())

    return Buffer(sample, update, extend)


def _torchrl(inputs: _Inputs) -> Buffer:
    library = peer("torchrl.data")
    try:
        storage = library.LazyTensorStorage(inputs.capacity, device=inputs.device)
        buffer = library.PrioritizedReplayBuffer(
            alpha=ALPHA, beta=BETA, eps=EPS, storage=storage, batch_size=inputs.batch
        )
    except RuntimeError as error:  # its compiled part is built for one release of torch
        raise Absent(f"torchrl's C++ extension does not load beside this torch: {_why(error)}") from error
    index = buffer.extend(inputs.on_device("rows"))
    buffer.update_priority(index, inputs.on_device("priority"))

    def sample() -> tuple[Any, Any, Any]:
        rows, described = buffer.sample()
        weight = described["priority_weight"] if "priority_weight" in described else described["_weight"]
        return rows, described["index"], weight

    return Buffer(sample, buffer.update_priority, buffer.extend)


def _why(error: Exception) -> str:
    """What the linker said; torchrl's own error only points to a warning."""
    try:
        importlib.import_module("torchrl._torchrl")
    except ImportError as cause:
        return str(cause).rpartition("/")[2][:120]
    return str(error)
