"""Long rows in parts, by one launch whose programs take work by ticket. Equations and bytes stand in the package.

Two launches, or a program that reads its row twice, bring a row from memory once more than they need to where the rows
in flight outgrow the second-level cache: 5N. Here every program takes the next ticket, an atomic count, until there is
none, and does

    item = (row, part)    sums of this part of this row, and
                          gradients of the same part of the row LAG before it, whose sums are complete by then

so that a row's second read follows its first by some hundred items, and finds the row in the cache: 3N.

A program waits for one thing only: that the parts of a row are summed, all of which have lower tickets. Whoever has a
lower ticket is running, and waits, if at all, for tickets lower still: nobody waits for a program that has not begun,
whatever the order of programs and however few of them run side by side. One after another (in the interpreter) none
waits at all.

What is added up is added in the order of parts and rows, by whichever program: results do not depend on who was first.
"""

import triton
import triton.language as tl

from ..common.reduce import sum_last
from ..common.rows import finished, gradient_row, in_strides, row_scale
from .stream import NEAR, PLAIN, SUMMED, first_read, second_read, sums_of

#: Numbers a part leaves: peak and sum of the student, of the teacher, the cross sum; its share of KL.
WIDTH = 6
_WIDTH = tl.constexpr(WIDTH)


@triton.jit
def _sum_part(
    s_row, t_row, s_step, t_step, k, begin, sums_ptr, counter_ptr,
    V: tl.constexpr, PART: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """Leave the sums of a part, and count it."""
    s_peak, s_acc, t_peak, t_acc, cross, _, _, _, _ = first_read(
        s_row, t_row, s_step, t_step, k, begin, V, PART, THREADS, VECTOR, ALONG, 0, False
    )
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    t_lane = tl.exp2((t_peak - t_max) * k)
    tl.store(sums_ptr, s_max)
    tl.store(sums_ptr + 1, tl.sum(s_acc * tl.exp2((s_peak - s_max) * k), axis=0))
    tl.store(sums_ptr + 2, t_max)
    tl.store(sums_ptr + 3, tl.sum(t_acc * t_lane, axis=0))
    tl.store(sums_ptr + 4, tl.sum(cross * t_lane, axis=0))
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _wait_for(counter_ptr, count):
    """Until so many have counted; what they stored before is there then."""
    arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while arrived < count:
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")


@triton.jit
def _sums_of_parts(sums_ptr, k, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """:func:`sums_of` the parts of a row."""
    part = tl.arange(0, PADDED)
    at, there = sums_ptr + part * _WIDTH, part < PARTS
    # Volatile: never from a cache that another multiprocessor's stores do not reach.
    return sums_of(
        tl.load(at, mask=there, other=-1e38, volatile=True),
        tl.load(at + 1, mask=there, other=0.0, volatile=True),
        tl.load(at + 2, mask=there, other=-1e38, volatile=True),
        tl.load(at + 3, mask=there, other=0.0, volatile=True),
        tl.load(at + 4, mask=there, other=0.0, volatile=True),
        k,
    )


@triton.jit
def kd_kl_tickets_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, temperature, temperature_ptr, divisor, divisor_ptr, num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    sums_ptr, ticket_ptr,
    V: tl.constexpr, UNIT: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr,
    PARTS: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr, LAG: tl.constexpr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr, RARE: tl.constexpr = True,
):  # fmt: skip
    """Items by ticket. ``ticket_ptr``: zeros, the next ticket and then two counts a row: parts summed, parts done."""
    if finished(upstream_ptr, EARLY_EXIT):
        return
    items = (num_rows + LAG) * PARTS
    # PARTS, unknown to the compiler: of rows of whole parts alone it would unroll the reads, and registers would spill.
    parts = items // (num_rows + LAG)
    item = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    while item < items:
        row = item // PARTS
        part = item - row * parts
        begin = part * PART
        if row < num_rows:
            _, _, _, k = row_scale(
                row, True, temperature, temperature_ptr, divisor, divisor_ptr, None, None, None,
                T_PTR, DIVISOR_PTR, False, False, 0,
            )  # fmt: skip
            outer, within = in_strides(row // inner, row % inner, UNIT)
            _sum_part(
                s_ptr + outer * s_outer + within * s_inner, t_ptr + outer * t_outer + within * t_inner,
                s_class, t_class, k, begin,
                sums_ptr + (tl.cast(row, tl.int64) * PARTS + part) * _WIDTH, ticket_ptr + 1 + 2 * row,
                V, PART, THREADS, VECTOR, ALONG,
            )  # fmt: skip

        row -= LAG
        if (row >= 0) & (row < num_rows):
            counts_ptr = ticket_ptr + 1 + 2 * row
            _wait_for(counts_ptr, PARTS)
            scale, counts, inv_t, k = row_scale(
                row, True, temperature, temperature_ptr, divisor, divisor_ptr, weight_ptr, mask_ptr, upstream_ptr,
                T_PTR, DIVISOR_PTR, WEIGHT, MASK, UPSTREAM,
            )  # fmt: skip
            outer, within = in_strides(row // inner, row % inner, UNIT)
            s_row = s_ptr + outer * s_outer + within * s_inner
            t_row = t_ptr + outer * t_outer + within * t_inner
            gs_row, gt_row = s_row, t_row  # where none is wanted: a tuple takes no None
            if GRAD_S:
                gs_row = gradient_row(gs_ptr, outer, within, gs_outer, gs_inner, GRAD_S)
            if GRAD_T:
                gt_row = gradient_row(gt_ptr, outer, within, gt_outer, gt_inner, GRAD_T)
            rows, strides = (s_row, t_row, gs_row, gt_row), (s_class, t_class, gs_class, gt_class)
            row_sums = sums_ptr + tl.cast(row, tl.int64) * (PARTS * _WIDTH)
            s_top, t_top, s_inv, t_inv, log_ratio, kl = _sums_of_parts(row_sums, k, PARTS, PADDED)
            sums = s_top, t_top, s_inv, t_inv, log_ratio, k
            g = tl.where(counts, scale * inv_t, 0.0)
            unlabelled = (0.0, 0.0, 0, 0, 0.0, 0.0, 0.0)

            near, rough, tells = False, False, part == 0
            if RARE:  # as in stream.gradients
                near = kl < 1e-3
                rough = kl < 0.05 * (1.0 + tl.abs(log_ratio))
            if near:
                # All sums once more, by what does not cancel: one program does the whole row. The others would have
                # to wait for each other, and in that order nothing says who has begun.
                if tells:
                    kl, centre = second_read(
                        rows, strides, g, counts, sums, 0.0, 0.0, unlabelled, 0,
                        V, V, THREADS, VECTOR, ALONG, NEAR, False, False, MASK, 0,
                    )  # fmt: skip
                    second_read(
                        rows, strides, g, counts, sums, centre, kl, unlabelled, 0,
                        V, V, THREADS, VECTOR, ALONG, NEAR, GRAD_S, GRAD_T, MASK, 0,
                    )  # fmt: skip
            elif rough:
                found = second_read(
                    rows, strides, g, counts, sums, 0.0, kl, unlabelled, begin,
                    V, PART, THREADS, VECTOR, ALONG, SUMMED, GRAD_S, GRAD_T, MASK, 0,
                )  # fmt: skip
                tl.store(row_sums + part * _WIDTH + 5, found[0])
                tl.debug_barrier()
                tells = tl.atomic_add(counts_ptr + 1, 1, sem="acq_rel", scope="gpu") == PARTS - 1
                if tells:
                    of_row = tl.arange(0, PADDED)
                    shares = row_sums + of_row * _WIDTH + 5
                    kl = tl.sum(tl.load(shares, mask=of_row < PARTS, other=0.0, volatile=True), axis=0)
            else:
                second_read(
                    rows, strides, g, counts, sums, 0.0, kl, unlabelled, begin,
                    V, PART, THREADS, VECTOR, ALONG, PLAIN, GRAD_S, GRAD_T, MASK, 0,
                )  # fmt: skip
            loss = tl.where(counts, scale * kl, 0.0)
            if STORE_ROWS:
                tl.store(rows_ptr + row, loss, mask=tells)
            if REDUCE:
                tl.store(partial_ptr + row, loss, mask=tells)
        item = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    if REDUCE:
        sum_last(num_rows, loss_ptr, partial_ptr, counter_ptr, 1024)
