"""The prioritized replay buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch

from kdfast.ops import replay as ops
from kdfast.profiling import annotate
from kdfast.reference.replay import Eviction, PriorityRule, ReplayState
from kdfast.replay import snapshot
from kdfast.replay.checks import (
    affine_of,
    as_vector,
    check_choice,
    check_exponents,
    check_int,
    check_real,
    check_rows,
    check_update,
    numbers,
)
from kdfast.replay.saving import Saving
from kdfast.replay.types import ReplayBatch, ReplayStats, TopK

PerChannel = float | Sequence[float] | torch.Tensor
Normalize = tuple[PerChannel, PerChannel]

#: Pairs of ``normalize`` whose tables are kept.
_AFFINE_KEPT = 64


class PrioritizedReplayBuffer(Saving):
    """Samples with priorities, drawn with replacement with probability

        P_i = (|δ_i| + ε)^α / Σ_k (|δ_k| + ε)^α        w_i = (N · P_i)^-β

    (Schaul et al. 2016; SSD-KD, Eqs. 4–5). Priorities are kept in fixed point, clip(round((|δ|+ε)^α · scale), 1,
    2³²−1), in an integer sum tree: every row stays reachable, nothing drifts, and for one seed a CPU and a GPU
    draw the same rows. On a CPU the work is done in C++ (one call a batch, without the GIL); on CUDA by Triton
    kernels (one launch each for ``sample``, ``update_priority`` and a first-in-first-out ``extend``), without a
    sync and fit for CUDA graphs. On a GPU, bad values that only a sync could raise are contained and counted
    (see :meth:`stats`); ``strict=True`` raises.

    Methods may be called from several threads of a process, and on CUDA on several streams: each is done as a whole,
    before or after the others'. Not ordered are replays of CUDA graphs, and calls inside ``torch.compile``, whose
    compiled code may work on copies: order those yourself. A process may fork at any time; forked children and
    started processes that are handed the buffer draw with seeds of their own (the n-th process the n-th). ``pickle``
    and ``copy`` give a buffer that goes on as this one would.

    Args:
        capacity: Slots, 1 to 2³¹.
        sample_shape: Shape of a row; ``()`` for scalars.
        dtype: Dtype of a row.
        num_classes: Classes to count; None: labels are kept, not counted.
        alpha: α ≥ 0; 0 draws uniformly.
        beta: β ≥ 0, with αβ < 1: when weights multiply the priorities, as in SSD-KD, αβ = 1 oscillates and more
            diverges.
        eps: ε ≥ 0.
        eviction: Who makes room in a full buffer: ``"fifo"`` the oldest, ``"lowest"`` the row of lowest priority,
            ``"class_balanced"`` (with ``num_classes``) the oldest of the largest class; the older of equals. Rows of
            one ``extend`` enter one after another; free slots are filled first, the lowest first. On a GPU the latter
            two choose their victims on the host, with a sync in ``extend``.
        device: Where rows and bookkeeping live.
        seed: 0 to 2⁶⁴ − 1.
        strict: Raise on priorities that are not finite (and, on a GPU, on everything else that is otherwise
            counted) at the price of a sync.
        scale: Fixed-point units of a mass of 1. The default spans masses from 2.4e-7 to 1024.
        duplicates: Which priority counts when an update names a slot twice: the ``"last"``, or the ``"max"``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
        MemoryError: The rows cannot be allocated.

    Example:
        >>> buffer = PrioritizedReplayBuffer(5000, (3, 32, 32), num_classes=10)
        >>> index = buffer.extend(images, labels)
        >>> batch = buffer.sample(256)
        >>> loss_per_row = distil(batch.samples)
        >>> buffer.update_priority(batch.index, batch.weight * loss_per_row, batch.generation)
    """

    def __init__(
        self,
        capacity: int,
        sample_shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.uint8,
        num_classes: int | None = None,
        alpha: float = 0.6,
        beta: float = 0.4,
        eps: float = 1e-6,
        eviction: Eviction = "fifo",
        device: torch.device | str = "cpu",
        seed: int = 0,
        strict: bool = False,
        scale: float = 2.0**22,
        duplicates: str = "last",
    ) -> None:
        check_int("capacity", capacity, 1, 1 << 31)
        shape = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
        for size in shape:
            check_int("sample_shape", size, 0, 1 << 62)
        if dtype not in snapshot.DTYPES.values():
            raise TypeError(f"dtype: got {dtype!r}, accepted: {', '.join(snapshot.DTYPES)}")
        if num_classes is not None:
            check_int("num_classes", num_classes, 1, 1 << 31)
        check_int("seed", seed, 0, (1 << 64) - 1)
        for name, value in (("alpha", alpha), ("beta", beta), ("eps", eps), ("scale", scale)):
            check_real(name, value)
        if not isinstance(strict, bool):
            raise TypeError(f"strict: got {strict!r}, accepted: True or False")
        if not 0 < scale <= 2.0**32:
            raise ValueError(f"scale: got {scale}, accepted: above 0, at most 2^32")
        check_choice("eviction", eviction, get_args(Eviction))
        check_choice("duplicates", duplicates, ("last", "max"))
        if eviction == "class_balanced" and num_classes is None:
            raise ValueError(
                "eviction: got 'class_balanced' with num_classes=None; accepted: with num_classes, or fifo, lowest"
            )
        check_exponents(alpha, beta)
        self._beta = float(beta)
        self._num_classes = num_classes
        self._largest = duplicates == "max"
        self._state = ReplayState.allocate(
            capacity,
            shape,
            dtype,
            num_classes or 0,
            torch.empty(0, device=device).device,  # "cuda" becomes "cuda:0"
            seed=seed,
            eviction=eviction,
            rule=PriorityRule(float(alpha), float(eps), float(scale)),
            strict=strict,
        )
        self._affine: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    # --- what it is -----------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Slots."""
        return self._state.capacity

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return self._state.sample_shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of a row."""
        return self._state.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where rows and bookkeeping live."""
        return self._state.device

    @property
    def num_classes(self) -> int | None:
        """Classes counted; None: labels are kept, not counted."""
        return self._num_classes

    @property
    def beta(self) -> float:
        """β of draws that name none. Assign to it to anneal: at least 0, finite, αβ < 1."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        check_real("beta", value)
        check_exponents(self._state.rule.alpha, value)
        self._beta = float(value)

    @property
    def nbytes(self) -> int:
        """Bytes of the bookkeeping, rows apart."""
        tensors: int = sum(getattr(self._state, name).nbytes for name in ReplayState.BOOKKEEPING)
        return tensors + (self._state.core.derived_bytes if self.device.type == "cpu" else 0)

    def __len__(self) -> int:
        """Rows held. On a GPU this waits for the device."""
        return self._state.live()

    def __repr__(self) -> str:
        rule = self._state.rule
        return (
            f"PrioritizedReplayBuffer({len(self)}/{self.capacity} rows of {list(self.sample_shape)} {self.dtype} "
            f"on {self.device}, alpha={rule.alpha}, beta={self.beta}, eviction={self._state.eviction!r})"
        )

    # --- the three calls of a training loop -----------------------------------------------------------------

    @annotate("replay.extend")
    def extend(
        self,
        samples: torch.Tensor,
        labels: torch.Tensor | Sequence[int] | None = None,
        priorities: torch.Tensor | Sequence[float] | None = None,
    ) -> torch.Tensor:
        """Insert rows, evicting others once the buffer is full.

        Args:
            samples: ``[n, *sample_shape]`` of the buffer's dtype, any device.
            labels: Integers ``[n]``, from 0 to ``num_classes`` − 1.
            priorities: |δ| ``[n]``, float; negative ones count by absolute value. Default: the running maximum,
                the largest |δ| this buffer was ever given (1 before the first).

        Returns:
            The slot of each row, int64 ``[n]``.

        Raises:
            TypeError: ``samples`` is no tensor, or its dtype is not the buffer's.
            ValueError: A shape does not fit; a label is no class; with ``strict`` a priority is not finite.
                Nothing has been inserted then.
        """
        if not isinstance(samples, torch.Tensor):
            raise TypeError(f"samples: got {type(samples).__name__}, accepted: a tensor")
        if samples.shape[1:] != self._state.rows.shape[1:] or samples.dim() == 0:
            raise ValueError(
                f"samples: got shape {list(samples.shape)}, accepted: [n, {str(list(self.sample_shape))[1:]}"
            )
        if samples.dtype != self.dtype:
            raise TypeError(f"samples: got {samples.dtype}, accepted: {self.dtype}")
        count = samples.shape[0]
        samples = samples.detach().to(self.device).contiguous()
        if labels is not None:
            labels = self._vector("labels", labels, torch.int64, count)
        if priorities is not None:
            priorities = self._vector("priorities", priorities, torch.float32, count)
        if self._state.strict and ops.on_kernels(self._state):
            check_rows(labels, priorities, self.num_classes)
        return ops.add(self._state, samples, labels, priorities)

    @annotate("replay.sample")
    def sample(
        self,
        batch_size: int,
        *,
        normalize: Normalize | None = None,
        beta: float | None = None,
        stratified: bool = True,
        max_normalize: bool = False,
    ) -> ReplayBatch:
        """Draw rows with replacement, in proportion to their priorities.

        Args:
            batch_size: Draws, at least 1; may exceed the rows held.
            normalize: ``(mean, std)``, numbers or one a channel (the sample's first dimension): samples come as
                float32, ``(x − mean) / std`` with x in [0, 1] for uint8 rows (divided by 255), as stored for
                others.
            beta: β of this draw instead of the buffer's.
            stratified: One draw in each of ``batch_size`` equal parts of the total mass: the same expectation
                with less variance. False: independent draws.
            max_normalize: Divide the weights by the batch's largest (the paper does not).

        Returns:
            The batch. For one seed, the k-th call returns the same rows on every device.

        Raises:
            ValueError: The buffer is empty; an argument is out of its range.
        """
        check_int("batch_size", batch_size, 1, 1 << 31)
        if not self._state.filled:
            raise ValueError("sample: the buffer is empty; extend() it first")
        if beta is None:
            beta = self._beta
        else:
            check_real("beta", beta)
            check_exponents(self._state.rule.alpha, beta)
        affine = None if normalize is None else self._normalization(normalize)
        drawn = ops.sample(self._state, batch_size, beta, stratified, affine)
        if max_normalize:
            drawn = drawn._replace(weight=drawn.weight / drawn.weight.max())
        return drawn

    @annotate("replay.update_priority")
    def update_priority(
        self,
        index: torch.Tensor | Sequence[int],
        priority: torch.Tensor | Sequence[float],
        generation: torch.Tensor | Sequence[int] | None = None,
    ) -> None:
        """Give rows new priorities.

        Args:
            index: Slots, integers ``[n]``; when one comes twice, see ``duplicates``.
            priority: The raw |δ|, float ``[n]``; α and ε are applied here. Negative ones count by absolute
                value; one that is not finite leaves the row as it was and is counted.
            generation: Integers ``[n]`` of the batch that the rows came with: rows overwritten since are skipped
                and counted.

        Raises:
            ValueError: Lengths differ; an index is out of range or an empty slot; with ``strict`` a priority is
                not finite. Nothing has been updated then. On a GPU without ``strict`` these are counted instead.
        """
        index = self._vector("index", index, torch.int64, None)
        priority = self._vector("priority", priority, torch.float32, index.numel())
        if generation is not None:
            generation = self._vector("generation", generation, torch.int64, index.numel())
        if self._state.strict and ops.on_kernels(self._state):
            with self._state.turns:  # from the check to the write
                self._state.follow()
                check_update(self._state.leaves, index, priority, generation)
                ops.update(self._state, index, priority, generation, self._largest)
            return
        ops.update(self._state, index, priority, generation, self._largest)

    # --- looking inside -------------------------------------------------------------------------------------

    def remove(self, index: torch.Tensor | Sequence[int]) -> None:
        """Take rows out; their slots are free. On a GPU this copies the bookkeeping to the host and back.

        Args:
            index: Slots, integers ``[n]``; empty ones are left so.

        Raises:
            ValueError: An index is out of range.
        """
        ops.remove(self._state, self._vector("index", index, torch.int64, None))

    def class_counts(self) -> torch.Tensor:
        """Rows held by class, int64 ``[num_classes]``, a copy; rows without a label are not in it.

        Raises:
            ValueError: The buffer was made without ``num_classes``.
        """
        if self.num_classes is None:
            raise ValueError("class_counts: the buffer was made with num_classes=None, which counts nothing")
        return self._state.copies("class_counts")["class_counts"]

    def top_k(self, k: int) -> TopK:
        """The rows of the ``k`` highest priorities (all, if there are fewer), the lower slot first of equals.

        Raises:
            ValueError: ``k`` is negative.
        """
        check_int("k", k, 0, 1 << 31)
        now = self._state.copies("leaves", "delta")
        mass = now["leaves"].long() & 0xFFFFFFFF
        k = min(k, int((mass > 0).sum()))
        # Ranks are unique, so that every device returns the same rows: 32 bits of mass, 31 of slot.
        slots = torch.arange(self.capacity, device=self.device)
        index = ((mass << 31) | (self.capacity - 1 - slots)).topk(k).indices
        return TopK(index, now["delta"][index])

    def stats(self) -> ReplayStats:
        """Counters and moments, read now. On a GPU this waits for the device."""
        return ReplayStats.of(self._state)

    @annotate("replay.rebuild")
    def rebuild(self) -> None:
        """Recompute all sums from the leaves. They are exact at all times: this changes nothing, and proves it."""
        ops.rebuild(self._state)

    # --- arguments ------------------------------------------------------------------------------------------

    def _vector(self, name: str, value: Any, dtype: torch.dtype, length: int | None) -> torch.Tensor:
        return as_vector(name, value, dtype, length, self._state.device)

    def _normalization(self, normalize: Normalize) -> tuple[torch.Tensor, torch.Tensor]:
        """(gain, bias) of float(x)·gain + bias, computed once a pair."""
        mean, std = map(numbers, normalize)
        key = (mean, std)
        known = self._affine.get(key)
        if known is None:
            channels = self.sample_shape[0] if self.sample_shape else 0
            with torch.inference_mode(False):
                gain, bias = affine_of(mean, std, channels, 255.0 if self.dtype == torch.uint8 else 1.0)
                known = gain.to(self.device), bias.to(self.device)
            # A graph under capture goes on reading the tensors, so that only a CPU's may be forgotten.
            if self._state.on_cpu and len(self._affine) >= _AFFINE_KEPT:
                self._affine.clear()
            self._affine[key] = known
        return known

    def _construct(self, **settings: Any) -> None:
        PrioritizedReplayBuffer.__init__(self, **settings)

    def _config(self) -> dict[str, Any]:
        state = self._state
        return {
            "capacity": self.capacity,
            "sample_shape": list(self.sample_shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_classes": self.num_classes,
            "alpha": state.rule.alpha,
            "beta": self._beta,
            "eps": state.rule.eps,
            "scale": state.rule.scale,
            "eviction": state.eviction,
            "seed": state.seed,
            "strict": state.strict,
            "duplicates": "max" if self._largest else "last",
            "device": self.device.type,
        }
