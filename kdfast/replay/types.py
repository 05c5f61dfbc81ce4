"""What a replay buffer returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kdfast.reference.replay import Meta, ReplayBatch, ReplayState

__all__ = ["ReplayBatch", "ReplayStats", "TopK"]


class TopK(NamedTuple):
    """Rows of the highest priority, the highest first.

    Attributes:
        index: int64 ``[k]``, their slots.
        priority: float32 ``[k]``, their |δ|.
    """

    index: torch.Tensor  # type: ignore[assignment]  # as every user calls it; tuple.index is not missed
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

    @classmethod
    def of(cls, state: ReplayState) -> ReplayStats:
        """Read a state, all of it at one moment."""
        now = state.copies("meta", "leaves", "delta")
        meta = {word: int(value) for word, value in zip(Meta, now["meta"].tolist(), strict=True)}
        mass = (now["leaves"].long() & 0xFFFFFFFF).double()
        squares = float((mass * mass).sum())
        bits = meta[Meta.MAX_PRIORITY]
        largest = float(torch.tensor(bits, dtype=torch.int32).view(torch.float32)) if bits >= 0 else math.nan
        return cls(
            size=meta[Meta.LIVE],
            capacity=state.capacity,
            inserted=meta[Meta.INSERTED],
            evicted=meta[Meta.EVICTED],
            draws=meta[Meta.STEP],
            max_priority=largest,
            mean_priority=float(now["delta"][now["leaves"] != 0].double().mean()),
            effective_size=float(mass.sum()) ** 2 / squares if squares else 0.0,
            non_finite=meta[Meta.NON_FINITE],
            stale=meta[Meta.STALE],
            saturated=meta[Meta.SATURATED],
            floored=meta[Meta.FLOORED],
            out_of_range=meta[Meta.OUT_OF_RANGE],
            empty_slot=meta[Meta.EMPTY_SLOT],
            bad_label=meta[Meta.BAD_LABEL],
        )
