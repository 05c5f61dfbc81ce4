"""The replay ops: choice of backend, and the registered forms that torch.compile sees.

Eager calls go straight to the C++ core or the kernels, since torch's dispatcher costs more than the work on a CPU.
First-in-first-out buffers live wholly on their device. The other evictions choose their victims in the C++ core:
`add` copies the bookkeeping of a buffer on a GPU to the host and back, which syncs.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch

from kdfast.backend import get_backend, interpreting, resolve
from kdfast.reference import replay as reference
from kdfast.reference.replay import ReplayBatch, ReplayState, forks

__all__ = ["add", "on_kernels", "rebuild", "remove", "sample", "update"]

#: Triton reads the environment when it is imported; so do we.
_INTERPRETING = interpreting()

Affine = tuple[torch.Tensor, torch.Tensor]


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels import replay

    return replay


def on_kernels(state: ReplayState) -> bool:
    """Whether the Triton kernels work on this state. They count what the C++ core raises."""
    if state.on_cpu and not _INTERPRETING and get_backend() != "triton":
        return False  # what resolve would say, a few microseconds later
    return resolve(state.leaves) == "triton"


def sample(
    state: ReplayState, batch_size: int, beta: float, stratified: bool = True, affine: Affine | None = None
) -> ReplayBatch:
    """Draw rows; see :func:`kdfast.reference.replay.sample`. One launch (two when rows exceed 16 KB)."""
    if torch.compiler.is_compiling():
        return ReplayBatch(
            *_sample_op(*_sample_state(state), batch_size, beta, stratified, *(affine or (None, None)))
        )
    if not on_kernels(state):
        return reference.sample(state, batch_size, beta, stratified, affine)
    kernels = _kernels()
    layout = (state.layout.offsets, state.layout.counts)
    with state.turns:
        state.follow()
        return ReplayBatch(
            *kernels.sample(*_sample_state(state), layout, batch_size, beta, stratified, affine)
        )


def update(
    state: ReplayState,
    index: torch.Tensor,
    priority: torch.Tensor,
    generation: torch.Tensor | None = None,
    largest: bool = False,
) -> None:
    """Re-score rows; see :func:`kdfast.reference.replay.update`. One launch."""
    if torch.compiler.is_compiling():
        state.foreign_writes = True
        rule = (state.rule.alpha, state.rule.eps, state.rule.scale)
        _update_op(*_update_state(state), index, priority, generation, *rule, largest)
        return
    if not on_kernels(state):
        reference.update(state, index, priority, generation, largest)
        return
    kernels = _kernels()
    layout = (state.layout.offsets, state.layout.counts)
    rule = (state.rule.alpha, state.rule.eps, state.rule.scale)
    with state.turns:
        state.follow()
        kernels.update(*_update_state(state), layout, index, priority, generation, rule, largest)
        state.foreign_writes = True


def add(
    state: ReplayState,
    samples: torch.Tensor,
    labels: torch.Tensor | None = None,
    priority: torch.Tensor | None = None,
) -> torch.Tensor:
    """Insert rows; see :func:`kdfast.reference.replay.add`. One launch a ``capacity`` of rows."""
    if not on_kernels(state):
        index = reference.add(state, samples, labels, priority)
        state.filled = state.filled or samples.shape[0] > 0
        return index
    with state.turns:
        state.filled = state.filled or samples.shape[0] > 0
        if state.eviction != "fifo":
            return reference.add(state, samples, labels, priority)
        state.follow()
        return _add_on_kernels(state, samples, labels, priority)


def _add_on_kernels(
    state: ReplayState, samples: torch.Tensor, labels: torch.Tensor | None, priority: torch.Tensor | None
) -> torch.Tensor:
    kernels = _kernels()
    layout = (state.layout.offsets, state.layout.counts)
    rule = (state.rule.alpha, state.rule.eps, state.rule.scale)
    memory = (*_update_state(state), state.labels, state.class_counts, state.order, state.rows)
    parts = []
    for start in range(0, samples.shape[0], state.capacity):
        part = slice(start, start + state.capacity)
        batch = [None if t is None else t[part] for t in (samples, labels, priority)]
        parts.append(kernels.add(*memory, layout, *batch, rule))
        state.foreign_writes = True
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=state.device)


def remove(state: ReplayState, index: torch.Tensor) -> None:
    """Empty slots; a rare call, always in the C++ core."""
    with state.turns:
        reference.remove(state, index)
        if on_kernels(state):  # which cannot refuse to draw from nothing
            state.filled = state.live() > 0


def rebuild(state: ReplayState) -> None:
    """Recompute all sums from the leaves."""
    if not on_kernels(state):
        reference.rebuild(state)
        return
    kernels = _kernels()
    with state.turns:
        state.follow()
        state.foreign_writes = True
        kernels.rebuild(state.leaves, state.sums, (state.layout.offsets, state.layout.counts))


def _sample_state(state: ReplayState) -> tuple[torch.Tensor, ...]:
    return state.meta, state.leaves, state.sums, state.generation, state.labels, state.rows


def _update_state(state: ReplayState) -> tuple[torch.Tensor, ...]:
    return state.meta, state.leaves, state.sums, state.delta, state.generation


# --- the registered forms: sample and update, the two calls of a training step -------------------------------


def _borrowed(
    meta: torch.Tensor,
    leaves: torch.Tensor,
    sums: torch.Tensor,
    generation: torch.Tensor,
    *,
    delta: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    rule: tuple[float, float, float] = (0.0, 0.0, 1.0),
) -> ReplayState:
    """The buffer's state that an op got the tensors of, so that its locks hold.

    The compiler may hand over copies instead; then a state over them, what is not used filled with empty memory.
    """
    own = forks.owner(meta, leaves)
    if own is not None:
        return cast(ReplayState, own)
    capacity, device = leaves.numel(), leaves.device
    return ReplayState(
        leaves=leaves,
        sums=sums,
        delta=torch.empty(capacity, device=device) if delta is None else delta,
        generation=generation,
        labels=torch.empty(capacity, dtype=torch.int32, device=device) if labels is None else labels,
        meta=meta,
        class_counts=torch.empty(0, dtype=torch.int64, device=device),
        rows=torch.empty(capacity, 0, device=device) if rows is None else rows,
        eviction="fifo",
        rule=reference.PriorityRule(*rule),
    )


_SAMPLE_SCHEMA = (
    "(Tensor(a0!) meta, Tensor leaves, Tensor sums, Tensor generation, Tensor labels, Tensor rows, SymInt batch_size, "
    "float beta, bool stratified, Tensor? gain, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_UPDATE_SCHEMA = (
    "(Tensor(a0!) meta, Tensor(a1!) leaves, Tensor(a2!) sums, Tensor(a3!) delta, Tensor generation, Tensor index, "
    "Tensor priority, Tensor? row_generation, float alpha, float eps, float scale, bool largest) -> ()"
)


@torch.library.custom_op("kdfast::replay_sample", mutates_args=("meta",), schema=_SAMPLE_SCHEMA)
def _sample_op(*flat: Any) -> tuple[torch.Tensor, ...]:
    meta, leaves, sums, generation, labels, rows, batch_size, beta, stratified, gain, bias = flat
    state = _borrowed(meta, leaves, sums, generation, labels=labels, rows=rows)
    affine = None if gain is None or bias is None else (gain, bias)
    return tuple(sample(state, batch_size, beta, stratified, affine))


@_sample_op.register_fake
def _(*flat: Any) -> tuple[torch.Tensor, ...]:
    _, leaves, _, _, _, rows, batch_size, _, _, gain, _ = flat

    kind = rows.dtype if gain is None else torch.float32
    samples = rows.new_empty((batch_size, *rows.shape[1:]), dtype=kind)
    described = (
        leaves.new_empty((batch_size,), dtype=kind) for kind in 3 * [torch.int64] + 2 * [torch.float32]
    )
    return samples, *described


@torch.library.custom_op(
    "kdfast::replay_update", mutates_args=("meta", "leaves", "sums", "delta"), schema=_UPDATE_SCHEMA
)
def _update_op(*flat: Any) -> None:
    meta, leaves, sums, delta, generation, index, priority, row_generation, *rule, largest = flat
    state = _borrowed(meta, leaves, sums, generation, delta=delta, rule=(rule[0], rule[1], rule[2]))
    update(state, index, priority, row_generation, largest)


@_update_op.register_fake
def _(*flat: Any) -> None:
    return None
