"""Prioritized replay on the CPU: the C++ core over torch's memory. The oracle of kernels/replay.py, bit for bit.

The state is a handful of tensors that both devices lay out alike (:class:`ReplayState`), so that either can
continue where the other stopped. State on a GPU can be worked on here too: its bookkeeping is copied over and back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch

from kdfast.errors import MissingExtraError

Eviction = Literal["fifo", "lowest", "class_balanced"]

#: Children of a node of the tree.
FANOUT = 256


class Meta(enum.IntEnum):
    """Positions in :attr:`ReplayState.meta`; those from NON_FINITE on count what was contained."""

    SEED = 0
    STEP = 1
    HEAD = 2
    LIVE = 3
    INSERTED = 4
    MAX_PRIORITY = 5
    PENDING_MAX = 6
    TICKET = 7
    NON_FINITE = 8
    STALE = 9
    SATURATED = 10
    FLOORED = 11
    OUT_OF_RANGE = 12
    BAD_LABEL = 13
    EMPTY_SLOT = 14
    EVICTED = 15


def extension() -> ModuleType:
    """``kdfast._C``.

    Raises:
        MissingExtraError: It was not built.
    """
    try:
        return importlib.import_module("kdfast._C")
    except ImportError as error:
        raise MissingExtraError(
            f"kdfast.replay needs kdfast's C++ extension, kdfast._C, which cannot be imported ({error}): it was "
            "not built when kdfast was installed, as a rule for want of a compiler. Install a C++17 compiler "
            "(g++ or clang++), then run: KDFAST_REQUIRE_EXTENSION=1 pip install --force-reinstall --no-deps "
            "--no-binary kdfast kdfast"
        ) from error


@dataclass(frozen=True)
class SumLayout:
    """Where the levels of sums lie: level 1 sums 256 leaves each, the last is the root, at offset 0.

    Attributes:
        offsets: First word of each level, level 1 first.
        counts: Nodes of each level.
        words: Length of the whole.
    """

    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    words: int

    @classmethod
    def of(cls, capacity: int) -> SumLayout:
        """The layout for this many leaves."""
        counts = [-(-capacity // FANOUT)]
        while counts[-1] > 1:
            counts.append(-(-counts[-1] // FANOUT))
        offsets, words = [0] * len(counts), 0
        for level in reversed(range(len(counts))):
            offsets[level] = words
            words += counts[level] + counts[level] % 2  # every level aligned to 16 bytes
        return cls(tuple(offsets), tuple(counts), words)


@dataclass(frozen=True)
class PriorityRule:
    """q = clip(round((|δ| + eps)^alpha · scale), 1, 2³² − 1)."""

    alpha: float
    eps: float
    scale: float


class ReplayBatch(NamedTuple):
    """Rows drawn from a buffer, with what describes them.

    Attributes:
        samples: ``[batch, *sample_shape]`` in the stored dtype, float32 when normalised. A copy.
        labels: int64 ``[batch]``; −1 for rows inserted without a label.
        index: int64 ``[batch]``, the slots they came from.
        generation: int64 ``[batch]``, which row of the slot it was: hand it to ``update_priority``, and rows
            that were overwritten in between are left alone.
        weight: float32 ``[batch]``, the importance weight (N·P)^−β.
        probability: float32 ``[batch]``, P of one draw.
    """

    samples: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # as every user calls it; tuple.index is not missed
    generation: torch.Tensor
    weight: torch.Tensor
    probability: torch.Tensor


@dataclass
class ReplayState:
    """All of a buffer's memory.

    Attributes:
        leaves: int32 ``[capacity]``, the bits of the u32 fixed-point priorities; 0 is an empty slot.
        sums: int64 words of the tree, see :class:`SumLayout`.
        delta: float32 ``[capacity]``, |δ| as given.
        generation: int32 ``[capacity]``, the bits of the u32 number of the insertion that filled the slot.
        labels: int32 ``[capacity]``, −1 for a row without a label.
        meta: int64, see :class:`Meta`.
        class_counts: int64 ``[num_classes]``.
        rows: ``[capacity, *sample_shape]``.
        eviction: Who leaves when the buffer is full.
        rule: From priority to leaf.
        strict: Priorities that are not finite are refused.
    """

    leaves: torch.Tensor
    sums: torch.Tensor
    delta: torch.Tensor
    generation: torch.Tensor
    labels: torch.Tensor
    meta: torch.Tensor
    class_counts: torch.Tensor
    rows: torch.Tensor
    eviction: Eviction
    rule: PriorityRule
    strict: bool = False
    #: Kernels have written since the C++ core last looked; what it derives must be renewed.
    foreign_writes: bool = field(default=False, repr=False)

    #: The tensors beside the rows.
    BOOKKEEPING = ("leaves", "sums", "delta", "generation", "labels", "meta", "class_counts")

    @classmethod
    def allocate(
        cls,
        capacity: int,
        sample_shape: tuple[int, ...],
        dtype: torch.dtype,
        num_classes: int,
        device: torch.device,
        *,
        seed: int,
        eviction: Eviction,
        rule: PriorityRule,
        strict: bool,
    ) -> ReplayState:
        """Empty state."""

        def filled(length: int, value: int, kind: torch.dtype) -> torch.Tensor:
            return torch.full((length,), value, dtype=kind, device=device)

        meta = torch.zeros(len(Meta), dtype=torch.int64)
        meta[Meta.SEED] = seed - (1 << 64) if seed >= 1 << 63 else seed
        meta[Meta.MAX_PRIORITY] = meta[Meta.PENDING_MAX] = -1
        return cls(
            leaves=filled(capacity, 0, torch.int32),
            sums=filled(SumLayout.of(capacity).words, 0, torch.int64),
            delta=filled(capacity, 0, torch.float32),
            generation=filled(capacity, 0, torch.int32),
            labels=filled(capacity, -1, torch.int32),
            meta=meta.to(device),
            class_counts=filled(num_classes, 0, torch.int64),
            rows=torch.zeros((capacity, *sample_shape), dtype=dtype, device=device),
            eviction=eviction,
            rule=rule,
            strict=strict,
        )

    @property
    def capacity(self) -> int:
        """Slots."""
        return self.leaves.numel()

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.leaves.device

    @cached_property
    def on_cpu(self) -> bool:
        """Whether the C++ core can work on the tensors where they are."""
        return self.device.type == "cpu"

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return tuple(self.rows.shape[1:])

    @cached_property
    def layout(self) -> SumLayout:
        """Of :attr:`sums`."""
        return SumLayout.of(self.capacity)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.rows.nbytes // self.capacity

    @cached_property
    def _core(self) -> Any:
        arrays = {name: getattr(self, name).numpy() for name in self.BOOKKEEPING}
        if self.row_bytes:
            arrays["rows"] = self.rows.reshape(-1).view(torch.uint8).numpy()
        rule = self.rule
        return extension().ReplayCore(
            self.capacity,
            self.row_bytes,
            self.class_counts.numel(),
            self.eviction,
            rule.alpha,
            rule.eps,
            rule.scale,
            self.strict,
            arrays,
        )

    @property
    def core(self) -> Any:
        """The C++ core over these tensors, which must be on the CPU."""
        core = self._core
        if self.foreign_writes:
            self.foreign_writes = False
            core.rebuild()
        return core

    @contextlib.contextmanager
    def on_host(self) -> Iterator[ReplayState]:
        """The bookkeeping on the CPU (itself, if it is there), written back on success. Rows stay away."""
        if self.on_cpu:
            yield self
            return
        copies = {name: getattr(self, name).cpu() for name in self.BOOKKEEPING}
        host = dataclasses.replace(self, **copies, rows=torch.empty(self.capacity, 0), foreign_writes=False)
        yield host
        for name, copy in copies.items():
            getattr(self, name).copy_(copy)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def add(
    state: ReplayState,
    samples: torch.Tensor,
    labels: torch.Tensor | None,
    priority: torch.Tensor | None,
) -> torch.Tensor:
    """Insert rows one after another; returns the slot of each, int64.

    Args:
        state: Any device.
        samples: ``[n, *sample_shape]`` of the rows' dtype on the state's device, contiguous.
        labels: None or int64 ``[n]``, contiguous; likewise on the state's device.
        priority: None (the running maximum) or float32 ``[n]``, contiguous; likewise.
    """
    count = samples.shape[0]
    index = torch.empty(count, dtype=torch.int64)
    if state.on_cpu:
        source = samples.data_ptr() if state.row_bytes else 0
        state.core.add(count, source, _address(labels), _address(priority), index.data_ptr())
        return index
    with state.on_host() as host:
        host_labels = None if labels is None else labels.cpu()
        host_priority = None if priority is None else priority.cpu()
        first = int(host.meta[Meta.INSERTED])
        host.core.add(count, 0, _address(host_labels), _address(host_priority), index.data_ptr())
        # A slot may have been given twice; the generation tells which row stayed.
        numbers = (torch.arange(count) + first).to(torch.int32)
        stayed = host.generation[index] == numbers
    kept = stayed.nonzero().squeeze(1)
    state.rows[index[kept].to(state.device)] = samples[kept.to(state.device)]
    return index.to(state.device)


def sample(
    state: ReplayState,
    batch_size: int,
    beta: float,
    stratified: bool,
    affine: tuple[torch.Tensor, torch.Tensor] | None,
) -> ReplayBatch:
    """Draw rows with P = q/S, with replacement; w = (N·P)^−β.

    Args:
        state: Any device.
        batch_size: Draws.
        beta: β.
        stratified: One draw in each of ``batch_size`` equal parts of the mass, else independent draws.
        affine: None, or (gain, bias), float32 ``[channels]`` each on the state's device: rows come as float32,
            ``row·gain + bias`` by first dimension of the sample.
    """
    if state.on_cpu:
        return _sample_here(state, batch_size, beta, stratified, affine)
    with state.on_host() as host:
        out = _sample_here(host, batch_size, beta, stratified, None)
    out = ReplayBatch(*(t.to(state.device) for t in out))
    samples = state.rows[out.index]
    return out._replace(samples=samples if affine is None else normalized(samples, *affine))


def _sample_here(
    state: ReplayState,
    batch_size: int,
    beta: float,
    stratified: bool,
    affine: tuple[torch.Tensor, torch.Tensor] | None,
) -> ReplayBatch:
    """On the CPU. Every microsecond here is one of a training step's: new_empty is torch's fastest allocation."""
    rows, meta, delta = state.rows, state.meta, state.delta
    fused = affine is not None and rows.dtype is torch.uint8
    shape = (batch_size, *state.sample_shape)
    samples = delta.new_empty(shape) if fused else rows.new_empty(shape)
    labels, index, generation = (meta.new_empty(batch_size) for _ in range(3))
    weight, probability = delta.new_empty(batch_size), delta.new_empty(batch_size)
    gain, bias = (t.numpy() for t in affine) if fused and affine is not None else (None, None)
    state.core.sample(
        batch_size,
        beta,
        stratified,
        samples.data_ptr() if state.row_bytes else 0,
        labels.data_ptr(),
        index.data_ptr(),
        generation.data_ptr(),
        weight.data_ptr(),
        probability.data_ptr(),
        gain,
        bias,
    )
    if affine is not None and not fused:
        samples = normalized(samples, *affine)
    return ReplayBatch(samples, labels, index, generation, weight, probability)


def normalized(samples: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``samples·gain + bias`` in float32, gain and bias by the sample's first dimension."""
    by_channel = (-1, *[1] * (samples.dim() - 2))
    return samples.float() * gain.view(by_channel) + bias.view(by_channel)


def update(
    state: ReplayState,
    index: torch.Tensor,
    priority: torch.Tensor,
    generation: torch.Tensor | None,
    largest: bool,
) -> None:
    """Re-score rows.

    Args:
        state: Any device.
        index: int64 ``[n]``, contiguous, on the state's device.
        priority: |δ| or δ, float32 ``[n]``, likewise.
        generation: None, or int64 ``[n]`` from the draw, likewise: rows overwritten since are skipped.
        largest: Of duplicates the largest counts, else the last.
    """
    if state.on_cpu:
        state.core.update(index.numel(), index.data_ptr(), priority.data_ptr(), _address(generation), largest)
        return
    with state.on_host() as host:
        update(host, index.cpu(), priority.cpu(), None if generation is None else generation.cpu(), largest)


def remove(state: ReplayState, index: torch.Tensor) -> None:
    """Empty these slots (int64 ``[n]``, contiguous, on the state's device)."""
    with state.on_host() as host:
        host.core.remove(index.numel(), index.to(host.device).data_ptr())


def rebuild(state: ReplayState) -> None:
    """Recompute all sums from the leaves."""
    with state.on_host() as host:
        host.core.rebuild()
