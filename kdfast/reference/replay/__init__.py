"""Prioritized replay on the CPU: the C++ core over torch's memory. The oracle of kernels/replay/, bit for bit."""

from kdfast.reference.replay.core import add, normalized, rebuild, remove, sample, update
from kdfast.reference.replay.extension import extension
from kdfast.reference.replay.state import (
    FANOUT,
    Eviction,
    Meta,
    PriorityRule,
    ReplayBatch,
    ReplayState,
    SumLayout,
)

__all__ = [
    "FANOUT",
    "Eviction",
    "Meta",
    "PriorityRule",
    "ReplayBatch",
    "ReplayState",
    "SumLayout",
    "add",
    "extension",
    "normalized",
    "rebuild",
    "remove",
    "sample",
    "update",
]
