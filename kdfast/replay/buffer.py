"""The prioritized replay buffer."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch

from kdfast.errors import CheckpointError
from kdfast.ops import replay as ops
from kdfast.reference.replay import Eviction, Meta, PriorityRule, ReplayState
from kdfast.replay import snapshot

Normalize = tuple[float | Sequence[float], float | Sequence[float]]


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
    index: torch.Tensor
    generation: torch.Tensor
    weight: torch.Tensor
    probability: torch.Tensor


class TopK(NamedTuple):
    """Rows of the highest priority, the highest first.

    Attributes:
        index: int64 ``[k]``, their slots.
        priority: float32 ``[k]``, their |δ|.
    """

    index: torch.Tensor
    priority: torch.Tensor


@dataclass(frozen=True)
class ReplayStats:
    """What a buffer holds, and what it had to contain.

    Attributes:
        size: Rows held.
        capacity: Slots.
        inserted: Rows ever inserted.
        evicted: Rows that made room for others.
        draws: Calls of ``sample``.
        max_priority: Largest |δ| ever given, NaN before the first.
        mean_priority: Mean |δ| of the rows held, NaN when empty.
        effective_size: (Σ P)² / Σ P²: how many rows the draws are really spread over.
        non_finite: Priorities that were NaN or infinite: an update kept the old one, an insert took the running
            maximum.
        stale: Updates of rows that had been overwritten.
        saturated: Priorities too large for the fixed point (lower ``scale``).
        floored: Priorities that rounded to 0 and count as the smallest instead (raise ``scale``).
        out_of_range: Updates of slots that do not exist (on a GPU; a CPU raises).
        empty_slot: Updates of slots that hold no row (on a GPU; a CPU raises).
        bad_label: Labels that are no class, stored as none (on a GPU; a CPU raises).
    """

    size: int
    capacity: int
    inserted: int
    evicted: int
    draws: int
    max_priority: float
    mean_priority: float
    effective_size: float
    non_finite: int
    stale: int
    saturated: int
    floored: int
    out_of_range: int
    empty_slot: int
    bad_label: int


class PrioritizedReplayBuffer:
    r"""Samples with priorities, drawn with replacement with probability

    .. math:: P_i = \frac{(|\delta_i| + \epsilon)^\alpha}{\sum_k (|\delta_k| + \epsilon)^\alpha},
              \quad w_i = (N P_i)^{-\beta}

    (Schaul et al. 2016; SSD-KD, Eqs. 4–5). Priorities are kept in fixed point, clip(round((|δ|+ε)^α · scale), 1,
    2³²−1), in an integer sum tree: every row stays reachable, nothing drifts, and for one seed a CPU and a GPU
    draw the same rows. On a CPU the work is done in C++ (one call a batch, without the GIL); on CUDA by Triton
    kernels (one launch each for ``sample``, ``update_priority`` and a first-in-first-out ``extend``), without a
    sync and fit for CUDA graphs. On a GPU, bad values that only a sync could raise are contained and counted
    (see :meth:`stats`); ``strict=True`` raises.

    Methods may be called from several threads of a process. On CUDA they may be called on several streams.

    Args:
        capacity: Slots, 1 to 2³¹.
        sample_shape: Shape of a row; ``()`` for scalars.
        dtype: Dtype of a row.
        num_classes: Classes to count; None: labels are kept, not counted.
        alpha: α ≥ 0; 0 draws uniformly.
        beta: β ≥ 0, with αβ < 1: when weights multiply the priorities, as in SSD-KD, αβ = 1 oscillates and more
            diverges.
        eps: ε ≥ 0.
        eviction: Who makes room in a full buffer: ``"fifo"`` the oldest, ``"lowest"`` the row of lowest
            priority, ``"class_balanced"`` the oldest row of the largest class; the older of equals. Rows of one
            ``extend`` enter one after another. On a GPU the latter two choose their victims on the host, with
            a sync in ``extend``.
        device: Where rows and bookkeeping live.
        seed: 0 to 2⁶⁴ − 1.
        strict: Raise on priorities that are not finite (and, on a GPU, on everything else that is otherwise
            counted) at the price of a sync.
        scale: Fixed-point units of a mass of 1. The default spans masses from 2.4e-7 to 1024.
        duplicates: Which priority counts when an update names a slot twice: the ``"last"``, or the ``"max"``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.

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
        _check_int("capacity", capacity, 1, 1 << 31)
        shape = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
        for size in shape:
            _check_int("sample_shape", size, 0, 1 << 62)
        if dtype not in snapshot.DTYPES.values():
            raise TypeError(f"dtype: got {dtype!r}, accepted: {', '.join(snapshot.DTYPES)}")
        if num_classes is not None:
            _check_int("num_classes", num_classes, 1, 1 << 31)
        _check_int("seed", seed, 0, (1 << 64) - 1)
        for name, value in (("alpha", alpha), ("beta", beta), ("eps", eps)):
            _check_real(name, value)
        if not 0 < scale <= 2.0**32:
            raise ValueError(f"scale: got {scale}, accepted: above 0, at most 2^32")
        _check_choice("eviction", eviction, get_args(Eviction))
        _check_choice("duplicates", duplicates, ("last", "max"))
        _check_exponents(alpha, beta)
        self.beta = float(beta)
        self.num_classes = num_classes
        self._seed = seed
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
            strict=bool(strict),
        )
        self._filled = False
        self._stream: Any = None
        self._affine: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    # --- what it is -----------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Slots."""
        return self._state.capacity

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return tuple(self._state.rows.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of a row."""
        return self._state.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where rows and bookkeeping live."""
        return self._state.device

    @property
    def nbytes(self) -> int:
        """Bytes of the bookkeeping, rows apart."""
        tensors = sum(getattr(self._state, name).nbytes for name in ReplayState.BOOKKEEPING)
        return tensors + (self._state.core.derived_bytes if self.device.type == "cpu" else 0)

    def __len__(self) -> int:
        """Rows held. On a GPU this waits for the device."""
        return int(self._state.meta[Meta.LIVE])

    def __repr__(self) -> str:
        rule = self._state.rule
        return (
            f"PrioritizedReplayBuffer({len(self)}/{self.capacity} rows of {list(self.sample_shape)} {self.dtype} "
            f"on {self.device}, alpha={rule.alpha}, beta={self.beta}, eviction={self._state.eviction!r})"
        )

    # --- the three calls of a training loop -----------------------------------------------------------------

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
            raise ValueError(f"samples: got shape {list(samples.shape)}, accepted: [n, {str(list(self.sample_shape))[1:]}")
        if samples.dtype != self.dtype:
            raise TypeError(f"samples: got {samples.dtype}, accepted: {self.dtype}")
        count = samples.shape[0]
        samples = samples.detach().to(self.device).contiguous()
        if labels is not None:
            labels = self._vector("labels", labels, torch.int64, count)
        if priorities is not None:
            priorities = self._vector("priorities", priorities, torch.float32, count)
        with self._in_order():
            if self._state.strict and self.device.type != "cpu":
                self._check_rows(labels, priorities)
            index = ops.add(self._state, samples, labels, priorities)
        self._filled = self._filled or count > 0
        return index

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
        if not isinstance(batch_size, int) or batch_size < 1 or batch_size > 1 << 31:
            _check_int("batch_size", batch_size, 1, 1 << 31)
        if not self._filled:
            raise ValueError("sample: the buffer is empty; extend() it first")
        if beta is None:
            beta = self.beta
        else:
            _check_real("beta", beta)
            _check_exponents(self._state.rule.alpha, beta)
        affine = None if normalize is None else self._normalization(normalize)
        if self._stream is None and self.device.type == "cpu":
            drawn = ops.sample(self._state, batch_size, beta, stratified, affine)
        else:
            with self._in_order():
                drawn = ops.sample(self._state, batch_size, beta, stratified, affine)
        if max_normalize:
            drawn = drawn._replace(weight=drawn.weight / drawn.weight.max())
        return ReplayBatch(*drawn)

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
        if self._stream is None and self.device.type == "cpu":
            ops.update(self._state, index, priority, generation, self._largest)
            return
        with self._in_order():
            if self._state.strict:
                self._check_update(index, priority, generation)
            ops.update(self._state, index, priority, generation, self._largest)

    # --- looking inside -------------------------------------------------------------------------------------

    def remove(self, index: torch.Tensor | Sequence[int]) -> None:
        """Take rows out; their slots are free. On a GPU this copies the bookkeeping to the host and back.

        Args:
            index: Slots, integers ``[n]``; empty ones are left so.

        Raises:
            ValueError: An index is out of range.
        """
        with self._in_order():
            ops.remove(self._state, self._vector("index", index, torch.int64, None))

    def class_counts(self) -> torch.Tensor:
        """Rows held by class, int64 ``[num_classes]``, a copy; rows without a label are not in it.

        Raises:
            ValueError: The buffer was made without ``num_classes``.
        """
        if self.num_classes is None:
            raise ValueError("class_counts: the buffer was made with num_classes=None, which counts nothing")
        with self._in_order():
            return self._state.class_counts.clone()

    def top_k(self, k: int) -> TopK:
        """The rows of the ``k`` highest priorities (all, if there are fewer), the lower slot first of equals.

        Raises:
            ValueError: ``k`` is negative.
        """
        _check_int("k", k, 0, 1 << 31)
        with self._in_order():
            mass = self._state.leaves.long() & 0xFFFFFFFF
            k = min(k, len(self))
            # Ranks are unique, so that every device returns the same rows: 32 bits of mass, 31 of slot.
            slots = torch.arange(self.capacity, device=self.device)
            index = ((mass << 31) | (self.capacity - 1 - slots)).topk(k).indices
            return TopK(index, self._state.delta[index])

    def stats(self) -> ReplayStats:
        """Counters and moments, read now. On a GPU this waits for the device."""
        with self._in_order():
            state = self._state
            meta = {word: int(value) for word, value in zip(Meta, state.meta.tolist(), strict=True)}
            mass = (state.leaves.long() & 0xFFFFFFFF).double()
            squares = float((mass * mass).sum())
            top = torch.tensor(meta[Meta.MAX_PRIORITY], dtype=torch.int32).view(torch.float32)
            live = state.leaves != 0
            return ReplayStats(
                size=meta[Meta.LIVE],
                capacity=self.capacity,
                inserted=meta[Meta.INSERTED],
                evicted=meta[Meta.EVICTED],
                draws=meta[Meta.STEP],
                max_priority=float(top) if meta[Meta.MAX_PRIORITY] >= 0 else math.nan,
                mean_priority=float(state.delta[live].double().mean()),
                effective_size=float(mass.sum()) ** 2 / squares if squares else 0.0,
                non_finite=meta[Meta.NON_FINITE],
                stale=meta[Meta.STALE],
                saturated=meta[Meta.SATURATED],
                floored=meta[Meta.FLOORED],
                out_of_range=meta[Meta.OUT_OF_RANGE],
                empty_slot=meta[Meta.EMPTY_SLOT],
                bad_label=meta[Meta.BAD_LABEL],
            )

    def rebuild(self) -> None:
        """Recompute all sums from the leaves. They are exact at all times: this changes nothing, and proves it."""
        with self._in_order():
            ops.rebuild(self._state)

    # --- saving ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything: settings, rows, priorities, slots, counters, seed and draw counter; copies, nothing shared."""
        with self._in_order():
            return {"config": self._config(), **snapshot.tensors_of(self._state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken: the next draws are the ones that the source would have made.

        Args:
            state: From :meth:`state_dict` of a buffer with the same capacity, sample shape, dtype, classes, α, ε,
                scale and eviction; β, seed and draw counter come from it.

        Raises:
            CheckpointError: The state is incomplete, inconsistent, or of other settings. The buffer is as before.
        """
        snapshot.check_config(state.get("config"), self._config())
        found = snapshot.check_tensors(self._state, state)
        with self._in_order():
            rows = found.pop("rows")
            for name, tensor in found.items():
                getattr(self._state, name).copy_(tensor)
            self._state.rows[: len(rows)].copy_(rows)
            self._state.foreign_writes = True
            self.beta = float(state["config"]["beta"])
            self._seed = int(state["config"]["seed"])
            self._filled = bool(found["meta"][Meta.LIVE] > 0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a snapshot file: versioned, a checksum for each section, replaced as a whole or not at all.

        Raises:
            OSError: The disk is full, the folder is missing or not writable. An older file is still whole then.
        """
        state = self.state_dict()
        config = {**state.pop("config"), "used_slots": len(state["rows"])}
        snapshot.write(path, config, state)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: torch.device | str | None = None
    ) -> PrioritizedReplayBuffer:
        """A buffer from a snapshot file.

        Args:
            path: Written by :meth:`save`.
            device: Where to put it; default: the kind of device it was saved from, the CPU where there is none.

        Raises:
            CheckpointError: The file is missing, of another version, truncated, damaged or inconsistent.
        """
        config, tensors = snapshot.read(path)
        settings = {key: config.get(key) for key in cls._SETTINGS}
        try:
            if device is None:
                device = "cuda" if config["device"] == "cuda" and torch.cuda.is_available() else "cpu"
            buffer = cls(**{**settings, "dtype": snapshot.DTYPES[config["dtype"]], "device": device})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{os.fspath(path)}: settings cannot be used ({error})") from error
        buffer.load_state_dict({"config": config, **tensors})
        return buffer

    _SETTINGS = (
        *("capacity", "sample_shape", "dtype", "num_classes", "alpha", "beta", "eps", "eviction"),
        *("seed", "strict", "scale", "duplicates"),
    )

    def _config(self) -> dict[str, Any]:
        state = self._state
        return {
            "capacity": self.capacity,
            "sample_shape": list(self.sample_shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_classes": self.num_classes,
            "alpha": state.rule.alpha,
            "beta": self.beta,
            "eps": state.rule.eps,
            "scale": state.rule.scale,
            "eviction": state.eviction,
            "seed": self._seed,
            "strict": state.strict,
            "duplicates": "max" if self._largest else "last",
            "device": self.device.type,
        }

    # --- arguments ------------------------------------------------------------------------------------------

    def _vector(self, name: str, value: Any, dtype: torch.dtype, length: int | None) -> torch.Tensor:
        """``value`` as a contiguous vector of this dtype on the buffer's device."""
        if not isinstance(value, torch.Tensor):
            value = torch.as_tensor(value)
            if value.numel() == 0:
                value = value.to(dtype)
        if value.dim() != 1 or (length is not None and value.shape[0] != length):
            expected = "[n]" if length is None else f"[{length}]"
            raise ValueError(f"{name}: got shape {list(value.shape)}, accepted: {expected}")
        if value.dtype != dtype:
            if dtype == torch.int64 and (value.is_floating_point() or value.dtype == torch.bool):
                raise TypeError(f"{name}: got {value.dtype}, accepted: an integer dtype")
            if value.is_complex():
                raise TypeError(f"{name}: got {value.dtype}, accepted: a real dtype")
        return value.detach().to(self._state.device, dtype).contiguous()

    def _normalization(self, normalize: Normalize) -> tuple[torch.Tensor, torch.Tensor]:
        """(gain, bias) of float(x)·gain + bias, computed once a pair."""
        mean, std = (tuple(x) if isinstance(x, Sequence) else (x,) for x in normalize)
        key = (mean, std)
        if key not in self._affine:
            channels = self.sample_shape[0] if self.sample_shape else 0
            for name, values in (("mean", mean), ("std", std)):
                if not channels or len(values) not in (1, channels):
                    raise ValueError(
                        f"normalize: got {len(values)} values of {name}, accepted: one, or {channels} "
                        f"(samples are {list(self.sample_shape)})"
                    )
            if not all(math.isfinite(m) for m in mean) or not all(s > 0 and math.isfinite(s) for s in std):
                raise ValueError(f"normalize: got {normalize}, accepted: finite means, positive deviations")
            means, stds = (torch.tensor(x, dtype=torch.float64).expand(channels) for x in (mean, std))
            unit = 255.0 if self.dtype == torch.uint8 else 1.0
            pair = (1 / (unit * stds)).float(), (-means / stds).float()
            self._affine[key] = pair[0].to(self.device), pair[1].to(self.device)
        return self._affine[key]

    def _check_rows(self, labels: torch.Tensor | None, priorities: torch.Tensor | None) -> None:
        """What the C++ core checks on a CPU, for strict buffers on a GPU; it syncs."""
        most = self.num_classes or 1 << 31
        if labels is not None and bool(((labels < 0) | (labels >= most)).any()):
            raise ValueError(f"labels: got one out of range, accepted: 0 to {most - 1}")
        if priorities is not None and not bool(priorities.isfinite().all()):
            raise ValueError("priority: got NaN or infinity, accepted: finite values (strict=True)")

    def _check_update(
        self, index: torch.Tensor, priority: torch.Tensor, generation: torch.Tensor | None
    ) -> None:
        if bool(((index < 0) | (index >= self.capacity)).any()):
            raise ValueError(f"index: got one out of range, accepted: 0 to {self.capacity - 1}")
        if generation is None and not bool((self._state.leaves[index] != 0).all()):
            raise ValueError("index: got an empty slot")
        self._check_rows(None, priority)

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """On CUDA, run after what other streams were given to do with this buffer."""
        if self.device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self._stream)
        self._stream = stream
        yield


def _check_int(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {value!r}, accepted: an integer")
    if not least <= value <= most:
        raise ValueError(f"{name}: got {value}, accepted: {least} to {most}")


def _check_real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {value!r}, accepted: a number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value}, accepted: at least 0, finite")


def _check_choice(name: str, value: Any, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}, accepted: {', '.join(accepted)}")


def _check_exponents(alpha: float, beta: float) -> None:
    # With δ = w·KL the fixed point is P ∝ KL^(α/(1+αβ)), reached only while αβ < 1.
    if alpha * beta >= 1:
        raise ValueError(
            f"alpha, beta: got {alpha} and {beta}, whose product is {alpha * beta:g}; accepted: below 1"
        )
