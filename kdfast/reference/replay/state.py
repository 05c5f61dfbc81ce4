"""A replay buffer's memory: a handful of tensors that CPU and GPU lay out alike, and whose turn it is with them.

Two locks keep it whole. The C++ core's own is taken by each of its calls, without Python's; nothing of Python runs
under it. :attr:`ReplayState.turns` is taken around everything else that touches the tensors (launches, copies to the
host and back), together with the order of CUDA streams. Whoever holds the core's never waits for a turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from kdfast.reference.replay import forks
from kdfast.reference.replay.extension import extension

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


@dataclass(eq=False)
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
        order: First-in-first-out only: int32 ``[capacity]``, all slots, from meta's HEAD on those that are free,
            ascending, then the rows from the oldest to the newest. It follows from the others.
        seed: What meta's SEED holds, to be read without waiting for a device.
        filled: Whether rows may be there; what is refused before a launch that could not say so.
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
    order: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    seed: int = 0
    filled: bool = False
    #: Kernels have written since the C++ core last looked; what it derives must be renewed.
    foreign_writes: bool = field(default=False, repr=False)
    #: Held by whoever touches the tensors outside the C++ core.
    turns: Any = field(default_factory=threading.RLock, repr=False)
    #: The CUDA stream that was last given work on the tensors.
    stream: Any = field(default=None, repr=False)
    #: Processes that were given a copy.
    children: int = field(default=0, repr=False)
    _core: Any = field(default=None, repr=False, init=False)

    #: The tensors beside the rows.
    BOOKKEEPING = ("leaves", "sums", "delta", "generation", "labels", "meta", "class_counts", "order")

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
        """Empty state.

        Raises:
            ValueError: More bytes than can be addressed.
            MemoryError: More bytes than there are.
        """
        size = capacity * math.prod(sample_shape) * dtype.itemsize
        if size >= 1 << 62:
            raise ValueError(
                f"capacity, sample_shape: got {capacity} and {list(sample_shape)}, {size} bytes of rows; "
                "accepted: below 2^62"
            )

        def filled(length: int, value: int, kind: torch.dtype) -> torch.Tensor:
            return torch.full((length,), value, dtype=kind, device=device)

        # Tensors of inference mode could never be written outside it.
        with torch.inference_mode(False):
            meta = torch.zeros(len(Meta), dtype=torch.int64)
            meta[Meta.SEED] = forks.signed(seed)
            meta[Meta.MAX_PRIORITY] = meta[Meta.PENDING_MAX] = -1
            try:
                state = cls(
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
                    order=torch.arange(
                        capacity if eviction == "fifo" else 0, dtype=torch.int32, device=device
                    ),
                    seed=seed,
                )
            except RuntimeError as error:
                if device.type != "cpu":
                    raise
                raise MemoryError(
                    f"capacity, sample_shape: got {capacity} and {list(sample_shape)}: {size} bytes of rows, and "
                    f"about {20 * capacity} of bookkeeping, cannot be allocated"
                ) from error
            state.follow()
        forks.register(state)
        return state

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

    # --- whose turn it is -----------------------------------------------------------------------------------

    def follow(self) -> None:
        """On CUDA, what this stream is given next runs after what other streams were given to do with the tensors.

        Call it with :attr:`turns` held, and launch before letting go. Streams under capture are left as they are.
        """
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self.device)
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)
            # Or the allocator would hand the memory on while this stream still reads it.
            for name in (*self.BOOKKEEPING, "rows"):
                getattr(self, name).record_stream(stream)
        self.stream = stream

    @property
    def core(self) -> Any:
        """The C++ core over these tensors, which must be on the CPU."""
        core = self._core
        if core is None or self.foreign_writes:
            core = self._current_core()
        return core

    def _current_core(self) -> Any:
        with self.turns:  # two cores would be two locks
            if self._core is None:
                self._core = self._new_core()
            if self.foreign_writes:
                self._core.rebuild()
                self.foreign_writes = False
            return self._core

    def _new_core(self) -> Any:
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

    @contextlib.contextmanager
    def on_host(self) -> Iterator[ReplayState]:
        """The bookkeeping on the CPU (itself, if it is there), written back on success. Rows stay away."""
        with self.turns:
            if self.on_cpu:
                yield self
                return
            self.follow()
            copies = {name: getattr(self, name).cpu() for name in self.BOOKKEEPING}
            host = dataclasses.replace(
                self, **copies, rows=torch.empty(self.capacity, 0), foreign_writes=False
            )
            yield host
            for name, copy in copies.items():
                getattr(self, name).copy_(copy)

    # --- reading and replacing it whole ---------------------------------------------------------------------

    def live(self) -> int:
        """Rows held. On a GPU this waits for the device."""
        if self.on_cpu:
            return int(self.core.word(int(Meta.LIVE)))
        with self.turns:
            self.follow()
            word = self.meta[Meta.LIVE].clone()
        return int(word)

    def copies(self, *names: str) -> dict[str, torch.Tensor]:
        """Copies of these tensors, all of one moment, on their device; ``rows`` stops at the last slot in use."""
        with self.turns:
            if self.on_cpu:
                own = {name: getattr(self, name) for name in names}
                found = self.core.copy(list(names))
                if "rows" in found and not self.row_bytes:  # bytes do not tell how many there are
                    return {
                        **{name: _typed(found[name], own[name]) for name in names if name != "rows"},
                        "rows": self.rows[: self._used(_typed(found["leaves"], self.leaves))].clone(),
                    }
                return {name: _typed(found[name], own[name]) for name in names}
            self.follow()
            kept = {name: getattr(self, name).clone() for name in names if name != "rows"}
            if "rows" in names:
                kept["rows"] = self.rows[: self._used(self.leaves)].clone()
            return kept

    @staticmethod
    def _used(leaves: torch.Tensor) -> int:
        live = leaves.nonzero()
        return int(live[-1]) + 1 if live.numel() else 0

    def load(self, found: dict[str, torch.Tensor], seed: int) -> None:
        """Replace everything at once by tensors on the CPU that have been checked; ``rows`` may be fewer."""
        with self.turns:
            arrays = {name: tensor.numpy() for name, tensor in found.items() if name != "rows"}
            rows = found["rows"]
            if self.on_cpu:
                arrays["rows"] = rows.reshape(-1).view(torch.uint8).numpy()
                self.core.load(arrays)
            else:
                with self.on_host() as host:
                    host.core.load(arrays)
                self.rows[: len(rows)].copy_(rows)
            self.seed, self.filled = seed, bool(found["meta"][Meta.LIVE] > 0)


def _typed(data: Any, like: torch.Tensor) -> torch.Tensor:
    """Bytes as a tensor of rows like these."""
    return torch.from_numpy(data).view(like.dtype).view(-1, *like.shape[1:])
