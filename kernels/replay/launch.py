"""Launches of sample, update, add and rebuild; the equations are in the package."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton

from ..launch import Launches, Planned, device_guard, launch
from . import bodies
from .plan import COMPARED, FUSED_ROW_BYTES, GATHER_BYTES, add_plan, interpreting, sample_plan, update_plan


def double_bits(value: float) -> int:
    """A float64 as an integer argument: Triton would round a float argument to float32."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def _levels(offsets: tuple[int, ...], counts: tuple[int, ...]) -> dict[str, int]:
    """Kernel arguments that say where the sums lie."""
    named = {"LEVELS": len(offsets)}
    for level in range(1, 4):  # the fourth, if any, is the root: one word at 0
        present = level <= len(offsets)
        named[f"offset{level}"] = offsets[level - 1] if present else 0
        named[f"count{level}"] = counts[level - 1] if present else 0
    return named


def words(rows: torch.Tensor) -> torch.Tensor:
    """Rows as ``[n, words]`` of int32 where they divide into that, else bytes, so that copies are wide."""
    flat = rows.reshape(rows.shape[0], -1)
    width = flat.shape[1] * flat.itemsize
    # Rows of no elements have nothing to widen, and no stride that divides.
    aligned = width > 0 and width % 4 == 0 and flat.data_ptr() % 4 == 0
    return flat.view(torch.int32 if aligned else torch.uint8)


def sample(
    meta: torch.Tensor,
    leaves: torch.Tensor,
    sums: torch.Tensor,
    generation: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
    layout: tuple[tuple[int, ...], tuple[int, ...]],
    batch_size: int,
    beta: float,
    stratified: bool,
    affine: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, ...]:
    """Draw; see ``kdfast.reference.replay.sample``. Returns samples, labels, index, generation, w, P."""
    device = leaves.device
    shape = (batch_size, *rows.shape[1:])
    out_rows = torch.empty(shape, dtype=rows.dtype if affine is None else torch.float32, device=device)
    described = [torch.empty(batch_size, dtype=torch.int64, device=device) for _ in range(3)]
    factors = [torch.empty(batch_size, dtype=torch.float32, device=device) for _ in range(2)]
    gather = _Gather.of(rows, out_rows, affine)
    fused = gather.words * gather.source.element_size() <= FUSED_ROW_BYTES
    capacity = leaves.numel()
    geometry = (
        batch_size,
        capacity,
        gather.words,
        gather.plane,
        layout,
        stratified,
        fused,
        affine is not None,
    )
    _SAMPLE(
        device,
        geometry,
        (
            meta, leaves, sums, generation, labels, *gather.tensors,
            *described, *factors, batch_size, double_bits(beta),
        ),
    )  # fmt: skip
    if not fused:
        block = GATHER_BYTES // gather.source.element_size()
        with device_guard(leaves):
            launch(
                bodies.replay_gather,
                (batch_size * triton.cdiv(gather.words, block),),
                described[1], *gather.tensors, capacity, gather.words, gather.plane,
                BLOCK=block, AFFINE=affine is not None,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return (out_rows, *described, *factors)


_Layout = tuple[tuple[int, ...], tuple[int, ...]]


def _planned_sample(
    batch_size: int,
    capacity: int,
    row: int,
    plane: int,
    layout: _Layout,
    stratified: bool,
    fused: bool,
    affine: bool,
) -> Planned:
    plan = sample_plan(row)
    constants = _levels(*layout) | {
        "STRATIFIED": stratified,
        "DRAWS": plan.rows,
        "BLOCK": plan.block,
        "GATHER": fused and row > 0,
        "AFFINE": affine,
        "num_warps": plan.num_warps,
        "enable_fp_fusion": False,
    }
    return (triton.cdiv(batch_size, plan.rows),), (capacity, row, plane), constants


def _planned_update(batch: int, capacity: int, layout: _Layout, checked: bool, largest: bool) -> Planned:
    plan = update_plan()
    constants = _levels(*layout) | {
        "CHECKED": checked,
        "LARGEST": largest,
        "ROWS": plan.rows,
        "BLOCK": plan.block,
        "num_warps": plan.num_warps,
        "enable_fp_fusion": False,
    }
    return (triton.cdiv(batch, plan.rows),), (), constants


_SAMPLE = Launches(bodies.replay_sample, _planned_sample)
_UPDATE = Launches(bodies.replay_update, _planned_update)


class _Gather(NamedTuple):
    """A copy of rows: words when they stay as they are, elements when they are normalised."""

    source: torch.Tensor
    target: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor
    words: int
    plane: int

    @classmethod
    def of(
        cls, rows: torch.Tensor, out: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor] | None
    ) -> _Gather:
        if affine is None:
            source, target = words(rows), words(out)
            return cls(source, target, source, source, source.shape[1], 1)
        elements = rows[0].numel()
        gain, bias = affine
        return cls(rows, out, gain, bias, elements, elements // gain.numel())

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.source, self.target, self.gain, self.bias


def update(
    meta: torch.Tensor,
    leaves: torch.Tensor,
    sums: torch.Tensor,
    delta: torch.Tensor,
    generation: torch.Tensor,
    layout: tuple[tuple[int, ...], tuple[int, ...]],
    index: torch.Tensor,
    priority: torch.Tensor,
    row_generation: torch.Tensor | None,
    rule: tuple[float, float, float],
    largest: bool,
) -> None:
    """Re-score; see ``kdfast.reference.replay.update``. Indices out of range and empty slots are counted."""
    batch, capacity = index.numel(), leaves.numel()
    beaten = None
    if batch > COMPARED:
        beaten = _beaten(leaves, generation, index, priority, row_generation, largest)
    _UPDATE(
        leaves.device,
        (batch, capacity, layout, row_generation is not None, largest),
        (
            meta, leaves, sums, delta, generation, index, priority,
            index if row_generation is None else row_generation, beaten,
            batch, capacity, *map(double_bits, rule),
        ),
    )  # fmt: skip


def _beaten(
    leaves: torch.Tensor,
    generation: torch.Tensor,
    index: torch.Tensor,
    priority: torch.Tensor,
    row_generation: torch.Tensor | None,
    largest: bool,
) -> torch.Tensor:
    """Which rows another row of their slot beats, by two stable sorts: what each would find in the whole batch."""
    capacity = leaves.numel()
    slot = index.clamp(0, capacity - 1)
    value = priority.abs()
    admitted = (index == slot) & (leaves[slot] != 0) & value.isfinite()
    if row_generation is not None:
        admitted &= (generation[slot].to(torch.int64) & 0xFFFFFFFF) == row_generation
    order = torch.arange(index.numel(), device=index.device)
    if largest:
        order = value.argsort(stable=True)
    # Rows that are not admitted beat nobody: they come last, each in a slot of its own.
    key = torch.where(admitted, slot, capacity + torch.arange(index.numel(), device=index.device))
    order = order[key[order].argsort(stable=True)]
    sorted_key = key[order]
    beaten = torch.zeros_like(admitted)
    beaten[order[:-1]] = sorted_key[1:] == sorted_key[:-1]
    return beaten


def add(
    meta: torch.Tensor,
    leaves: torch.Tensor,
    sums: torch.Tensor,
    delta: torch.Tensor,
    generation: torch.Tensor,
    labels: torch.Tensor,
    class_counts: torch.Tensor,
    order: torch.Tensor,
    rows: torch.Tensor,
    layout: tuple[tuple[int, ...], tuple[int, ...]],
    samples: torch.Tensor,
    row_labels: torch.Tensor | None,
    priority: torch.Tensor | None,
    rule: tuple[float, float, float],
) -> torch.Tensor:
    """Insert first-in-first-out, at most ``capacity`` rows; returns their slots.

    A label out of range is stored as none and counted; a priority that is not finite becomes the running maximum.
    """
    count, capacity = samples.shape[0], leaves.numel()
    index = torch.empty(count, dtype=torch.int64, device=leaves.device)
    source, target = words(samples), words(rows)
    if source.dtype != target.dtype:  # samples that start at an odd byte
        source, target = (t.reshape(t.shape[0], -1).view(torch.uint8) for t in (samples, rows))
    plan = add_plan(source.shape[1])
    with device_guard(leaves):
        launch(
            bodies.replay_add,
            (triton.cdiv(count, plan.rows),),
            meta, leaves, sums, delta, generation, labels, class_counts, order, target,
            source, index if row_labels is None else row_labels, delta if priority is None else priority, index,
            count, capacity, class_counts.numel(), source.shape[1], *map(double_bits, rule),
            **_levels(*layout),
            LABELS=row_labels is not None, PRIORITY=priority is not None, ROWS=plan.rows, BLOCK=plan.block,
            num_warps=plan.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return index


def rebuild(
    leaves: torch.Tensor, sums: torch.Tensor, layout: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """Recompute all sums from the leaves, a launch a level."""
    offsets, counts = layout
    below, size, first = leaves, leaves.numel(), 0
    with device_guard(leaves):
        for level, (offset, count) in enumerate(zip(offsets, counts)):
            nodes = 16 if interpreting() else 4
            launch(
                bodies.replay_rebuild,
                (triton.cdiv(count, nodes),),
                below, sums, first, size, offset, count,
                LEAVES=level == 0, NODES=nodes, num_warps=4,
            )  # fmt: skip
            below, size, first = sums, count, offset
