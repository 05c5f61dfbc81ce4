"""Kernel bodies: the equations, bytes and launch plans stand there.

State arrives as int32 and int64 tensors whose bits are u32 and u64 (torch has few operations on unsigned types).
α, β, ε and the scale arrive as the bits of float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..philox import uniform_u64
from .fixed_point import QUANTUM_MAX, fixed_pow, mass_of, round_mass

# Positions in `meta`, as in csrc/ring_slots.hpp.
SEED = tl.constexpr(0)
STEP = tl.constexpr(1)
HEAD = tl.constexpr(2)
LIVE = tl.constexpr(3)
INSERTED = tl.constexpr(4)
MAX_PRIORITY = tl.constexpr(5)
PENDING_MAX = tl.constexpr(6)
TICKET = tl.constexpr(7)
NON_FINITE = tl.constexpr(8)
STALE = tl.constexpr(9)
SATURATED = tl.constexpr(10)
FLOORED = tl.constexpr(11)
OUT_OF_RANGE = tl.constexpr(12)
BAD_LABEL = tl.constexpr(13)
EMPTY_SLOT = tl.constexpr(14)
EVICTED = tl.constexpr(15)

FLOAT_INF_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _u32(word):  # type: ignore[no-untyped-def]
    """The value of u32 bits held in an int32, as int64."""
    return word.to(tl.int64) & 0xFFFFFFFF


@triton.jit
def _count(meta, position: tl.constexpr, flags):  # type: ignore[no-untyped-def]
    """Add the number of true flags to a counter; silent when there is none, which is the rule."""
    number = tl.sum(flags.to(tl.int64), 0)
    if number > 0:
        tl.atomic_add(meta + position, number, sem="relaxed")


# --- the tree ------------------------------------------------------------------------------------------------


@triton.jit
def _add_to_sums(  # type: ignore[no-untyped-def]
    sums, slot, change, valid, offset1, offset2, offset3, LEVELS: tl.constexpr
):
    """Add each leaf's change to its ancestors; the root takes one add a program."""
    if LEVELS > 1:
        tl.atomic_add(sums + offset1 + (slot >> 8), change, mask=valid, sem="relaxed")
    if LEVELS > 2:
        tl.atomic_add(sums + offset2 + (slot >> 16), change, mask=valid, sem="relaxed")
    if LEVELS > 3:
        tl.atomic_add(sums + offset3 + (slot >> 24), change, mask=valid, sem="relaxed")
    tl.atomic_add(sums, tl.sum(tl.where(valid, change, 0), 0), sem="relaxed")


@triton.jit
def _choose_child(masses, rest, node):  # type: ignore[no-untyped-def]
    """The child whose interval holds ``rest``, and what is left of it inside; masses are u64 ``[draws, 256]``."""
    upto = tl.cumsum(masses, 1)
    passed = upto <= rest[:, None]
    child = node * 256 + tl.sum(passed.to(tl.int64), 1)
    return child, rest - tl.sum(tl.where(passed, masses, 0), 1)


@triton.jit
def _sum_children(sums, node, offset, count):  # type: ignore[no-untyped-def]
    child = node[:, None] * 256 + tl.arange(0, 256)[None, :]
    return tl.load(sums + offset + child, mask=child < count, other=0).to(tl.uint64, bitcast=True)


@triton.jit
def _find(  # type: ignore[no-untyped-def]
    leaves, sums, rest, capacity,
    offset1, offset2, offset3, count1, count2, count3,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Slots whose prefix interval holds ``rest`` (u64, below the root)."""
    node = (rest * 0).to(tl.int64)
    if LEVELS > 3:
        node, rest = _choose_child(_sum_children(sums, node, offset3, count3), rest, node)
    if LEVELS > 2:
        node, rest = _choose_child(_sum_children(sums, node, offset2, count2), rest, node)
    if LEVELS > 1:
        node, rest = _choose_child(_sum_children(sums, node, offset1, count1), rest, node)
    slot = node[:, None] * 256 + tl.arange(0, 256)[None, :]
    masses = _u32(tl.load(leaves + slot, mask=slot < capacity, other=0)).to(tl.uint64)
    slot, _ = _choose_child(masses, rest, node)
    return tl.minimum(slot, capacity.to(tl.int64) - 1)  # only an empty tree gets there


@triton.jit
def _copy_rows(  # type: ignore[no-untyped-def]
    source, target, source_row, target_row, valid, gain, bias, first, last, words, plane,
    BLOCK: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Words ``first`` to ``last`` of each row; with AFFINE ``row·gain + bias`` by channel, in float32."""
    for start in range(first, last, BLOCK):
        word = start + tl.arange(0, BLOCK)
        mask = valid[:, None] & (word < last)[None, :]
        value = tl.load(source + source_row[:, None] * words + word[None, :], mask=mask)
        if AFFINE:
            channel = word // plane
            g = tl.load(gain + channel, mask=word < last)
            b = tl.load(bias + channel, mask=word < last)
            value = value.to(tl.float32) * g[None, :] + b[None, :]
        tl.store(target + target_row[:, None] * words + word[None, :], value, mask=mask)


# --- kernels -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["batch", "beta_bits", "capacity"])
def replay_sample(  # type: ignore[no-untyped-def]
    meta, leaves, sums, generation, labels, rows, out_rows, gain, bias,
    out_labels, out_index, out_generation, out_weight, out_probability,
    batch, beta_bits, capacity, words, plane,
    offset1, offset2, offset3, count1, count2, count3,
    LEVELS: tl.constexpr, STRATIFIED: tl.constexpr, DRAWS: tl.constexpr, BLOCK: tl.constexpr,
    GATHER: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """DRAWS draws a program: target, descent, what describes the row, the row."""
    draw = tl.program_id(0) * DRAWS + tl.arange(0, DRAWS).to(tl.int64)
    valid = draw < batch
    step = tl.load(meta + STEP)
    uniform = uniform_u64(tl.load(meta + SEED), step, draw)
    total = tl.load(sums).to(tl.uint64, bitcast=True)
    if STRATIFIED:
        # Bounds floor(i·S / B), without a product beyond 64 bits.
        parts = batch.to(tl.uint64)
        whole, part = total // parts, total % parts
        i = draw.to(tl.uint64)
        low = i * whole + (i * part) // parts
        high = (i + 1) * whole + ((i + 1) * part) // parts
        target = low + tl.umulhi(uniform, high - low)
    else:
        target = tl.umulhi(uniform, total + (uniform & 0))
    target = tl.where(valid, target, 0)
    slot = _find(
        leaves, sums, target, capacity,
        offset1, offset2, offset3, count1, count2, count3, LEVELS,
    )  # fmt: skip

    quantum = _u32(tl.load(leaves + slot)).to(tl.float64)
    mass, live = total.to(tl.float64), tl.load(meta + LIVE).to(tl.float64)
    beta = beta_bits.to(tl.int64).to(tl.float64, bitcast=True)
    weight = fixed_pow(mass / (live * quantum), beta)
    probability = quantum / mass
    if total == 0:  # a graph replayed after all rows were removed: draws of no row, which count for nothing
        weight, probability = quantum * 0, quantum * 0
    tl.store(out_index + draw, slot, mask=valid)
    tl.store(out_labels + draw, tl.load(labels + slot).to(tl.int64), mask=valid)
    tl.store(out_generation + draw, _u32(tl.load(generation + slot)), mask=valid)
    tl.store(out_weight + draw, weight.to(tl.float32), mask=valid)
    tl.store(out_probability + draw, probability.to(tl.float32), mask=valid)
    if GATHER:
        _copy_rows(rows, out_rows, slot, draw, valid, gain, bias, 0, words, words, plane, BLOCK, AFFINE)

    # The last program to come here advances the draw counter: by then every program has read it.
    tl.debug_barrier()
    if tl.atomic_add(meta + TICKET, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(meta + TICKET, 0)
        tl.store(meta + STEP, step + 1)


@triton.jit(do_not_specialize=["capacity"])
def replay_gather(  # type: ignore[no-untyped-def]
    index, rows, out_rows, gain, bias, capacity, words, plane,
    BLOCK: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """A block of one long row."""
    blocks = tl.cdiv(words, BLOCK)
    draw = tl.program_id(0) // blocks + tl.arange(0, 1).to(tl.int64)
    slot = tl.load(index + draw)
    first = tl.program_id(0) % blocks * BLOCK
    last = tl.minimum(first + BLOCK, words)
    _copy_rows(
        rows, out_rows, slot, draw, slot < capacity, gain, bias, first, last, words, plane, BLOCK, AFFINE
    )


@triton.jit
def _admitted(
    meta, leaves, generation, slot, priority, row_generation, inside, capacity, CHECKED: tl.constexpr
):  # type: ignore[no-untyped-def]
    """Which rows of an update may be written, and why the others may not."""
    in_range = inside & (slot >= 0) & (slot < capacity)
    there = in_range & (tl.load(leaves + slot, mask=in_range, other=0) != 0)
    if CHECKED:
        current = there & (_u32(tl.load(generation + slot, mask=in_range, other=0)) == row_generation)
    else:
        current = there
    finite = (priority.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < FLOAT_INF_BITS
    return in_range, there, current, current & finite


@triton.jit(do_not_specialize=["batch", "capacity", "alpha_bits", "eps_bits", "scale_bits"])
def replay_update(  # type: ignore[no-untyped-def]
    meta, leaves, sums, delta, generation, index, priority, row_generation, beaten_ptr,
    batch, capacity, alpha_bits, eps_bits, scale_bits,
    offset1, offset2, offset3, count1, count2, count3,
    LEVELS: tl.constexpr, CHECKED: tl.constexpr, LARGEST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, each compared with the whole batch: one row writes a slot, the last or the largest.

    Of large batches the comparison has been made before (``beaten_ptr``), by sorting.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < batch
    slot = tl.load(index + row, mask=inside, other=-1)
    value = tl.abs(tl.load(priority + row, mask=inside, other=0.0))
    number = tl.load(row_generation + row, mask=inside, other=0)
    in_range, there, current, admitted = _admitted(
        meta, leaves, generation, slot, value, number, inside, capacity, CHECKED
    )

    # Another admitted row of the same slot beats this one if it comes later, or if it is larger.
    if beaten_ptr is not None:
        beaten = tl.load(beaten_ptr + row, mask=inside, other=0).to(tl.int32)
    else:
        beaten = tl.zeros([ROWS], tl.int32)
        for start in range(0, batch, BLOCK):
            other = start + tl.arange(0, BLOCK)
            other_inside = other < batch
            other_slot = tl.load(index + other, mask=other_inside, other=-1)
            other_value = tl.abs(tl.load(priority + other, mask=other_inside, other=0.0))
            other_number = tl.load(row_generation + other, mask=other_inside, other=0)
            _, _, _, other_admitted = _admitted(
                meta,
                leaves,
                generation,
                other_slot,
                other_value,
                other_number,
                other_inside,
                capacity,
                CHECKED,
            )
            same = (slot[:, None] == other_slot[None, :]) & other_admitted[None, :]
            wins = other[None, :] > row[:, None]
            if LARGEST:
                equal = other_value[None, :] == value[:, None]
                wins = (other_value[None, :] > value[:, None]) | (equal & wins)
            beaten |= tl.max((same & wins).to(tl.int32), 1)
    writes = admitted & (beaten == 0)

    mass = mass_of(value, alpha_bits, eps_bits, scale_bits)
    quantum = round_mass(mass)
    before = _u32(tl.load(leaves + slot, mask=writes, other=0))
    tl.store(leaves + slot, quantum.to(tl.int32), mask=writes)
    tl.store(delta + slot, value, mask=writes)
    _add_to_sums(sums, slot, quantum - before, writes, offset1, offset2, offset3, LEVELS)

    # Every admitted row counts for the maximum and the counters, as if written one after another.
    bits = tl.where(admitted, value.to(tl.int32, bitcast=True).to(tl.int64), -1)
    tl.atomic_max(meta + MAX_PRIORITY, tl.max(bits, 0), sem="relaxed")
    _count(meta, SATURATED, admitted & (mass >= QUANTUM_MAX + 0.5))
    _count(meta, FLOORED, admitted & (mass < 0.5))
    _count(meta, NON_FINITE, current & (admitted == 0))
    _count(meta, OUT_OF_RANGE, inside & (in_range == 0))
    if CHECKED:
        _count(meta, STALE, in_range & (current == 0))
    else:
        _count(meta, EMPTY_SLOT, in_range & (there == 0))


@triton.jit(do_not_specialize=["count", "capacity", "classes", "alpha_bits", "eps_bits", "scale_bits"])
def replay_add(  # type: ignore[no-untyped-def]
    meta, leaves, sums, delta, generation, labels, class_counts, order, rows,
    source, row_labels, priority, index,
    count, capacity, classes, words, alpha_bits, eps_bits, scale_bits,
    offset1, offset2, offset3, count1, count2, count3,
    LEVELS: tl.constexpr, LABELS: tl.constexpr, PRIORITY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, into the ring's slots from its head on; count ≤ capacity keeps the slots distinct."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = row < count
    head, inserted = tl.load(meta + HEAD), tl.load(meta + INSERTED)
    position = head + row
    position = tl.where(position >= capacity, position - capacity, position)
    slot = tl.load(order + position, mask=inside, other=0).to(tl.int64)
    tl.store(index + row, slot, mask=inside)

    # The running maximum before this batch stands in for priorities that are absent or not finite.
    top = tl.load(meta + MAX_PRIORITY)
    fallback = tl.where(top < 0, 1.0, top.to(tl.int32).to(tl.float32, bitcast=True))
    value = tl.zeros([ROWS], tl.float32) + fallback
    if PRIORITY:
        given = tl.abs(tl.load(priority + row, mask=inside, other=0.0))
        finite = (given.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < FLOAT_INF_BITS
        value = tl.where(finite, given, value)
        _count(meta, NON_FINITE, inside & (finite == 0))
    mass = mass_of(value, alpha_bits, eps_bits, scale_bits)
    quantum = round_mass(mass)
    before = _u32(tl.load(leaves + slot, mask=inside, other=0))
    evicts = inside & (before != 0)
    old_label = tl.load(labels + slot, mask=evicts, other=-1)
    label = tl.full([ROWS], -1, tl.int64)
    if LABELS:
        label = tl.load(row_labels + row, mask=inside, other=-1)
        limit = tl.where(classes > 0, classes.to(tl.int64), 1 << 31)
        good = (label >= 0) & (label < limit)
        _count(meta, BAD_LABEL, inside & (good == 0))
        label = tl.where(good, label, -1)

    tl.store(leaves + slot, quantum.to(tl.int32), mask=inside)
    tl.store(delta + slot, value, mask=inside)
    tl.store(labels + slot, label.to(tl.int32), mask=inside)
    tl.store(generation + slot, (inserted + row).to(tl.int32), mask=inside)
    one = tl.full([ROWS], 1, tl.int64)
    tl.atomic_add(
        class_counts + old_label, -one, mask=(old_label >= 0) & (old_label < classes), sem="relaxed"
    )
    tl.atomic_add(class_counts + label, one, mask=inside & (label >= 0) & (label < classes), sem="relaxed")
    _add_to_sums(sums, slot, quantum - before, inside, offset1, offset2, offset3, LEVELS)
    _count(meta, LIVE, inside & (before == 0))
    _count(meta, EVICTED, evicts)
    _count(meta, SATURATED, inside & (mass >= QUANTUM_MAX + 0.5))
    _count(meta, FLOORED, inside & (mass < 0.5))
    bits = tl.where(inside, value.to(tl.int32, bitcast=True).to(tl.int64), -1)
    tl.atomic_max(meta + PENDING_MAX, tl.max(bits, 0), sem="relaxed")
    _copy_rows(source, rows, row, slot, inside, source, source, 0, words, words, 1, BLOCK, False)

    # The last program moves the ring on and publishes the maximum: by then every program has read both.
    tl.debug_barrier()
    if tl.atomic_add(meta + TICKET, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(meta + TICKET, 0)
        moved = head + count
        tl.store(meta + HEAD, tl.where(moved >= capacity, moved - capacity, moved))
        tl.store(meta + INSERTED, inserted + count)
        tl.store(meta + MAX_PRIORITY, tl.maximum(top, tl.atomic_xchg(meta + PENDING_MAX, -1, sem="relaxed")))


@triton.jit(do_not_specialize=["first", "size", "offset", "count"])
def replay_rebuild(  # type: ignore[no-untyped-def]
    below, sums, first, size, offset, count, LEAVES: tl.constexpr, NODES: tl.constexpr
):
    """NODES sums of 256 words of the level below."""
    node = tl.program_id(0) * NODES + tl.arange(0, NODES).to(tl.int64)
    child = node[:, None] * 256 + tl.arange(0, 256)[None, :]
    words = tl.load(below + first + child, mask=child < size, other=0)
    if LEAVES:
        masses = _u32(words)
    else:
        masses = words
    tl.store(sums + offset + node, tl.sum(masses, 1), mask=node < count)
