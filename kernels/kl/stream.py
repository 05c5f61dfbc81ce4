"""Rows that are read class by class in a loop: what a thread keeps of them, and the second read that has gradients.

A thread takes VECTOR classes at a time (common/vectors.py) and keeps one peak for all of them: 2 + 3/VECTOR
exponentials an element where a peak for each lane position takes 4.
"""

import triton
import triton.language as tl

from ..common.rows import gap_of, load_logits, near_terms, no_logits, store_gradient
from ..common.vectors import block_classes, blocks_of, over_vector, scaled
from .labels import label_gradient

# How the second read makes the gradient: from the first read's KL; summing KL once more; by what does not cancel.
PLAIN = tl.constexpr(0)
SUMMED = tl.constexpr(1)
NEAR = tl.constexpr(2)


@triton.jit
def two_blocks(s_row, t_row, s_step, t_step, classes, there):
    """Both networks' logits of a whole block, as they lie in memory; asked for while the block before is worked on."""
    classes = classes.to(tl.int64)
    return tl.load(s_row + classes * s_step, mask=there), tl.load(t_row + classes * t_step, mask=there)


@triton.jit
def more_of_row(
    state, s, t, classes, k, V: tl.constexpr, ALONG: tl.constexpr, LABELS: tl.constexpr, STATS: tl.constexpr
):  # fmt: skip
    """What a thread keeps (:func:`first_read`), with one more vector of classes."""
    s_peak, s_acc, t_peak, t_acc, cross, total, logit_sum, s_class, t_class = state
    s_best, t_best = tl.max(s, axis=ALONG), tl.max(t, axis=ALONG)
    s_new, t_new = tl.maximum(s_peak, s_best), tl.maximum(t_peak, t_best)
    s_top, t_top = scaled(s_new, k), scaled(t_new, k)
    t_old, t_now = tl.exp2(scaled(t_peak, k) - t_top), tl.exp2(t * k - over_vector(t_top, ALONG))
    s_now = tl.exp2(s * k - over_vector(s_top, ALONG))
    s_acc = s_acc * tl.exp2(scaled(s_peak, k) - s_top) + tl.sum(s_now, axis=ALONG)
    t_acc = t_acc * t_old + tl.sum(t_now, axis=ALONG)
    cross = cross * t_old + tl.sum(t_now * tl.maximum(t - s, -1e30), axis=ALONG)
    if LABELS > 0:
        now = tl.exp2((s - over_vector(s_new, ALONG)) * 1.4426950408889634)
        total = total * tl.exp2((s_peak - s_new) * 1.4426950408889634) + tl.sum(now, axis=ALONG)
        logit_sum += tl.sum(tl.where(classes < V, s, 0.0), axis=ALONG)
    if STATS:
        now = tl.exp2((t - over_vector(t_new, ALONG)) * 1.4426950408889634)
        total = total * tl.exp2((t_peak - t_new) * 1.4426950408889634) + tl.sum(now, axis=ALONG)
        # The first of equals: of a vector the lowest, of two the one that was read before.
        s_first = tl.min(tl.where(s == over_vector(s_best, ALONG), classes, V), axis=ALONG)
        t_first = tl.min(tl.where(t == over_vector(t_best, ALONG), classes, V), axis=ALONG)
        s_class = tl.where(s_best > s_peak, s_first, s_class)
        t_class = tl.where(t_best > t_peak, t_first, t_class)
    return s_new, s_acc, t_new, t_acc, cross, total, logit_sum, s_class, t_class


@triton.jit
def first_read(
    s_row, t_row, s_step, t_step, k, begin,
    V: tl.constexpr, LENGTH: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr,
    LABELS: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """What LENGTH classes of a row leave in each thread.

    Returns:
        (peak, sum) of the student and of the teacher; Σ e^t·(t - s), which gives KL before anything is read again;
        Σ exp at temperature 1, the student's for labels, else the teacher's; Σ s; the classes of the peaks.
    """
    s_peak, s_acc = no_logits([THREADS])
    t_peak, t_acc = no_logits([THREADS])
    zero = tl.zeros([THREADS], tl.float32)
    first = tl.zeros([THREADS], tl.int32)
    state = (s_peak, s_acc, t_peak, t_acc, zero, zero, zero, first, first)
    BLOCK: tl.constexpr = THREADS * VECTOR
    whole, end = blocks_of(begin, V, LENGTH, BLOCK)
    lanes = block_classes(THREADS, VECTOR, ALONG)
    s_next, t_next = two_blocks(s_row, t_row, s_step, t_step, begin + lanes, whole > 0)
    for start in tl.range(0, whole, BLOCK):
        s, t = s_next.to(tl.float32), t_next.to(tl.float32)
        after = start + BLOCK
        s_next, t_next = two_blocks(s_row, t_row, s_step, t_step, begin + after + lanes, after < whole)
        state = more_of_row(state, s, t, begin + start + lanes, k, V, ALONG, LABELS, STATS)
    for start in tl.range(whole, end, BLOCK):
        classes = (begin + start + lanes).to(tl.int64)
        s, t = (
            load_logits(s_row, classes, s_step, classes < V),
            load_logits(t_row, classes, t_step, classes < V),
        )
        state = more_of_row(state, s, t, begin + start + lanes, k, V, ALONG, LABELS, STATS)
    return state


@triton.jit
def gradient_block(
    so_far, s, t, rows, strides, g, counts, sums, centre, kl, labelled, classes,
    V: tl.constexpr, ALONG: tl.constexpr, MODE: tl.constexpr, STORE_S: tl.constexpr, STORE_T: tl.constexpr,
    MASK: tl.constexpr, LABELS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block; return (KL, S) so far with its terms added, a thread each."""
    s_top, t_top, s_inv, t_inv, log_ratio, k = sums
    live = None if WHOLE else classes < V
    q, p = tl.exp2(s * k - s_top), tl.exp2(t * k - t_top)
    found = so_far
    if MODE == PLAIN and not STORE_T:
        grad = q * (g * s_inv) - p * (g * t_inv)
        q *= s_inv
    else:
        q *= s_inv
        p *= t_inv
        gap = gap_of(s, t, k, log_ratio)
        delta, centre_term = gap * 0.6931471805599453, q - p
        term = p * delta
        if MODE == NEAR:
            term, centre_term, delta = near_terms(gap, p, q, t > float("-inf"))
        # Added up before anything is stored: fewer registers at once.
        total, centre_total = tl.sum(term, axis=ALONG), tl.sum(centre_term, axis=ALONG)
        if (
            MODE == SUMMED
        ):  # Σ (q - p) is 0 but for what rounding did to the two log-sum-exps, which δ has, too
            total += centre_total
        found = so_far[0] + total, so_far[1] + centre_total
        grad = g * (centre_term - centre * q)
        if STORE_T:
            store_gradient(rows[3] + classes * strides[3], g * p * (delta + centre - kl), counts, live, MASK)
    if STORE_S:
        if LABELS > 0:
            peak, inv_total, label, second_label, first, second, smoothing = labelled
            probability = tl.exp2((s - peak) * 1.4426950408889634) * inv_total
            grad += label_gradient(probability, classes, label, second_label, first, second, smoothing, V)
        store_gradient(rows[2] + classes * strides[2], grad, counts, live, MASK)
    return found


@triton.jit
def second_read(
    rows, strides, g, counts, sums, centre, kl, labelled, begin,
    V: tl.constexpr, LENGTH: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr,
    MODE: tl.constexpr, STORE_S: tl.constexpr, STORE_T: tl.constexpr, MASK: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Read LENGTH classes of a row once more: store their gradients, and return their part of (KL, S).

    Args:
        rows: Where the row begins: student, teacher, and their gradients.
        strides: From class to class, of each.
        sums: What :func:`sums_of` returns, without KL, and k.
        labelled: Peak of the student, 1/Σ exp at temperature 1, two labels, their factors, smoothing.
    """
    zero = tl.zeros([THREADS], tl.float32)
    found = (zero, zero)
    BLOCK: tl.constexpr = THREADS * VECTOR
    whole, end = blocks_of(begin, V, LENGTH, BLOCK)
    lanes = block_classes(THREADS, VECTOR, ALONG)
    # From the cache, by as many warps as there are: nothing is asked for ahead.
    for start in tl.range(0, whole, BLOCK):
        classes = (begin + start + lanes).to(tl.int64)
        s, t = two_blocks(rows[0], rows[1], strides[0], strides[1], classes, None)
        s, t = s.to(tl.float32), t.to(tl.float32)
        found = gradient_block(
            found, s, t, rows, strides, g, counts, sums, centre, kl, labelled, classes,
            V, ALONG, MODE, STORE_S, STORE_T, MASK, LABELS, True,
        )  # fmt: skip
    for start in tl.range(whole, end, BLOCK):
        classes = (begin + start + lanes).to(tl.int64)
        s, t = (
            load_logits(rows[0], classes, strides[0], classes < V),
            load_logits(rows[1], classes, strides[1], classes < V),
        )
        found = gradient_block(
            found, s, t, rows, strides, g, counts, sums, centre, kl, labelled, classes,
            V, ALONG, MODE, STORE_S, STORE_T, MASK, LABELS, False,
        )  # fmt: skip
    return tl.sum(found[0], axis=0), tl.sum(found[1], axis=0)


@triton.jit
def sums_of(s_peak, s_acc, t_peak, t_acc, cross, k):
    """Of parts of a row: s·k and t·k at its peaks, 1/Σ of both, log2 of the ratio of their sums; KL."""
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    s_top, t_top = scaled(s_max, k), scaled(t_max, k)
    t_part = tl.exp2(scaled(t_peak, k) - t_top)
    s_inv = 1.0 / tl.sum(s_acc * tl.exp2(scaled(s_peak, k) - s_top), axis=0)
    t_sum = tl.sum(t_acc * t_part, axis=0)
    t_inv = 1.0 / t_sum
    log_ratio = (t_top - s_top) + tl.log2(t_sum * s_inv)
    kl = (tl.sum(cross * t_part, axis=0) * t_inv * k - log_ratio) * 0.6931471805599453
    return s_top, t_top, s_inv, t_inv, log_ratio, kl


@triton.jit
def gradients(
    rows, strides, g, counts, sums, kl, labelled, begin,
    V: tl.constexpr, LENGTH: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, ALONG: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, MASK: tl.constexpr, LABELS: tl.constexpr,
    RARE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of LENGTH classes of a row; return the row's KL as exactly as it can be had.

    The first read's KL is a difference of numbers as large as ``log_ratio``: right unless it is much smaller than they
    are. Then it is summed again, and where student and teacher nearly agree by what does not cancel. (A part of a row
    knows the whole row's KL in the latter way only: it would have to read it.) RARE = False leaves both out: a variant
    to count instructions of, which is never launched.
    """
    STORE: tl.constexpr = GRAD_S or GRAD_T
    near, rough = False, False
    if RARE:
        near = kl < 1e-3
        if LENGTH == V:
            rough = kl < 0.05 * (1.0 + tl.abs(sums[4]))
    if near:
        kl, centre = second_read(
            rows, strides, g, counts, sums, 0.0, 0.0, labelled, 0,
            V, V, THREADS, VECTOR, ALONG, NEAR, False, False, MASK, LABELS,
        )  # fmt: skip
        if STORE:
            second_read(
                rows, strides, g, counts, sums, centre, kl, labelled, begin,
                V, LENGTH, THREADS, VECTOR, ALONG, NEAR, GRAD_S, GRAD_T, MASK, LABELS,
            )  # fmt: skip
    elif rough:
        kl, _ = second_read(
            rows, strides, g, counts, sums, 0.0, kl, labelled, begin,
            V, LENGTH, THREADS, VECTOR, ALONG, SUMMED, GRAD_S, GRAD_T, MASK, LABELS,
        )  # fmt: skip
    elif STORE:
        second_read(
            rows, strides, g, counts, sums, 0.0, kl, labelled, begin,
            V, LENGTH, THREADS, VECTOR, ALONG, PLAIN, GRAD_S, GRAD_T, MASK, LABELS,
        )  # fmt: skip
    return kl
