"""Prioritized replay on the CPU: the C++ core over torch's memory. The oracle of kernels/replay/, bit for bit."""

from .core import (
    FANOUT,
    Eviction,
    Meta,
    PriorityRule,
    ReplayBatch,
    ReplayState,
    SumLayout,
    add,
    extension,
    normalized,
    rebuild,
    remove,
    sample,
    update,
)

__all__ = [
    *("FANOUT", "Eviction", "Meta", "PriorityRule", "ReplayBatch", "ReplayState", "SumLayout", "add", "extension"),
    *("normalized", "rebuild", "remove", "sample", "update"),
]
