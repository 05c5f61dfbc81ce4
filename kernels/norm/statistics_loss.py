"""How far the statistics of a batch norm's input are from those it remembers: loss in one pass, gradient in one more.

Statistics of channel c over its n values, μ and σ² the layer's running ones, k the share of a remembered average:

    d = (1/n)·Σ (x - μ),   mean = μ + d,   var = (1/n)·Σ (x - μ)² - d²            (biased; one read of x)
    r = μ - (1-k)·mean - k·mean_avg,        s = σ² - (1-k)·var - k·var_avg
    loss = ‖r‖₂ + ‖s‖₂ over channels        (DeepInversion, Yin et al. 2020, Eq. 4; SSD-KD, Liu et al., Eq. 1)
         or ‖r‖₂² + ‖s‖₂² ("squared")
    dx = u·(a_c + b_c·(x - mean_c)) + g     a = -(1-k)·r/(n·‖r‖),  b = -2·(1-k)·s/(n·‖s‖);  squared: -2·(1-k)·r/n, …
    u: gradient of the loss, g: gradient that x has from elsewhere (what the batch norm itself sends back)

Shifting by μ keeps the second moment from cancelling where the batch is near what the layer remembers: var loses
about (d/σ)² units in the last place.

Bytes moved, X = bytes of the input: X forward; backward 2X, or 3X with g, which saves autograd its sum (3X).

Launch plan: one launch each way. Forward, a program sums one channel's planes of some samples (NCHW) or a block of
channels of some pixels (NHWC), three tiles copied to shared memory ahead of the one that is summed; the program that
finishes last adds the partial sums in a fixed order and does the rest, so results are the same bit for bit every time.
Planes that do not begin at 16 bytes (7 × 7) are read from the 16 bytes before, by whole groups. Backward walks planes
(their coefficients loaded once a row), or where these are unaligned, and for NHWC, all elements in the order of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launch import MAX_GRID_Y, Launches, Planned, reduction

#: Programs that a forward launch aims at: a few for each multiprocessor.
PLANE_PROGRAMS, ROW_PROGRAMS = 512, 256


@dataclass(frozen=True)
class StatisticsPlan:
    """What a forward launch looks like.

    Attributes:
        rows: Samples (NCHW) or pixels (NHWC) of a tile.
        width: Pixels of a plane (NCHW) or channels (NHWC) of a tile.
        window: Elements of 16 bytes where planes begin anywhere and are read from the 16 bytes before; else 0.
        splits: Programs that share a channel.
        stages: Of the loop over tiles: one more than are copied ahead; 1 where enough programs hide each other's loads.
        finish_rows: Partial sums that the last program adds at once,
        finish_width: of that many channels.
    """

    rows: int
    width: int
    window: int
    splits: int
    stages: int
    finish_rows: int
    finish_width: int


def statistics_plan(samples: int, channels: int, plane: int, itemsize: int, nhwc: bool) -> StatisticsPlan:
    """2048 elements a tile, and enough programs to fill the device.

    Args:
        samples: N.
        channels: C.
        plane: Pixels of a sample.
        itemsize: Bytes of an element.
        nhwc: Whether channels are innermost.
    """
    window = 0
    if nhwc:
        width = min(triton.next_power_of_2(channels), 64)
        blocks, length, programs, chunks = triton.cdiv(channels, width), samples * plane, ROW_PROGRAMS, 1
    else:
        group = 16 // itemsize
        # Whole groups must not reach past the end of the tensor.
        if plane % group and plane >= 2 * group and samples * channels * plane % group == 0:
            window = group
        width = min(triton.next_power_of_2(plane + max(0, window - 1)), 1024)
        blocks, length, programs = channels, samples, PLANE_PROGRAMS
        chunks = triton.cdiv(plane + max(0, window - 1), width)
    rows = min(2048 // width, triton.next_power_of_2(length))
    splits = max(1, min(triton.cdiv(programs, blocks), triton.cdiv(length, rows)))
    steps = triton.cdiv(length, rows * splits) * chunks
    stages = 1 if blocks * splits > 2 * PLANE_PROGRAMS else min(4, steps + 1)
    finish_rows = min(triton.next_power_of_2(splits), 64)
    # Eight channels a thread: with sixteen the last program's registers, which all others have to hold, doubled.
    finish_width = min(triton.next_power_of_2(channels), 4096 // finish_rows, 1024)
    return StatisticsPlan(rows, width, window, splits, stages, finish_rows, finish_width)


@triton.jit
def _finish(
    partial_ptr, mean_ptr, var_ptr, average_mean_ptr, average_var_ptr, share_ptr, stats_ptr, loss_ptr,
    mean_out_ptr, var_out_ptr, channels, inverse_n, SPLITS: tl.constexpr, SQUARED: tl.constexpr,
    FINISH_ROWS: tl.constexpr, FINISH_WIDTH: tl.constexpr,
):  # fmt: skip
    """Statistics, loss and gradient coefficients from the programs' partial sums ``[2, SPLITS, channels]``."""
    share = tl.full([], 0.0, tl.float32)
    if share_ptr is not None:
        share = tl.load(share_ptr).to(tl.float32)
    own = 1.0 - share
    mean_square = tl.full([], 0.0, tl.float32)
    var_square = tl.full([], 0.0, tl.float32)
    lane = tl.arange(0, FINISH_WIDTH)
    for start in range(0, channels, FINISH_WIDTH):
        c = start + lane
        live = c < channels
        first = tl.zeros([FINISH_WIDTH], tl.float32)
        second = tl.zeros([FINISH_WIDTH], tl.float32)
        for split in range(0, SPLITS, FINISH_ROWS):
            row = split + tl.arange(0, FINISH_ROWS)
            at = partial_ptr + row[:, None] * channels + c[None, :]
            there = (row < SPLITS)[:, None] & live[None, :]
            first += tl.sum(tl.load(at, mask=there, other=0.0, volatile=True), axis=0)
            second += tl.sum(tl.load(at + SPLITS * channels, mask=there, other=0.0, volatile=True), axis=0)
        running_mean = tl.load(mean_ptr + c, mask=live, other=0).to(tl.float32)
        running_var = tl.load(var_ptr + c, mask=live, other=0).to(tl.float32)
        d = first * inverse_n
        var = tl.maximum(second * inverse_n - d * d, 0.0)
        r = -d
        s = running_var - var
        if average_mean_ptr is not None:
            r = own * r + share * (running_mean - tl.load(average_mean_ptr + c, mask=live, other=0))
            s = own * s + share * (running_var - tl.load(average_var_ptr + c, mask=live, other=0))
        mean_square += tl.sum(tl.where(live, r * r, 0.0), axis=0)
        var_square += tl.sum(tl.where(live, s * s, 0.0), axis=0)
        tl.store(stats_ptr + c, running_mean + d, mask=live)
        tl.store(stats_ptr + channels + c, var, mask=live)
        if mean_out_ptr is not None:
            tl.store(mean_out_ptr + c, running_mean + d, mask=live)
            tl.store(var_out_ptr + c, var, mask=live)
        tl.store(stats_ptr + 2 * channels + c, r, mask=live)
        tl.store(stats_ptr + 3 * channels + c, s, mask=live)
    # r and s become a and b, now that their norms are known.
    if SQUARED:
        tl.store(loss_ptr, mean_square + var_square)
        mean_factor = -2.0 * own * inverse_n
        var_factor = -4.0 * own * inverse_n
    else:
        mean_norm = tl.sqrt(mean_square)
        var_norm = tl.sqrt(var_square)
        tl.store(loss_ptr, mean_norm + var_norm)
        # Where a norm is 0, so is every gap: any finite factor gives a gradient of 0.
        mean_factor = -own * inverse_n / tl.where(mean_norm > 0, mean_norm, 1.0)
        var_factor = -2.0 * own * inverse_n / tl.where(var_norm > 0, var_norm, 1.0)
    tl.debug_barrier()
    for start in range(0, channels, FINISH_WIDTH):
        c = start + lane
        live = c < channels
        at = stats_ptr + 2 * channels + c
        tl.store(at, tl.load(at, mask=live, other=0.0, volatile=True) * mean_factor, mask=live)
        at += channels
        tl.store(at, tl.load(at, mask=live, other=0.0, volatile=True) * var_factor, mask=live)


@triton.jit(do_not_specialize=["inverse_n", "samples"])
def bn_statistics_kernel(
    x_ptr, mean_ptr, var_ptr, average_mean_ptr, average_var_ptr, share_ptr,
    stats_ptr, loss_ptr, mean_out_ptr, var_out_ptr, partial_ptr, counter_ptr, samples, channels, inverse_n,
    PLANE: tl.constexpr, NHWC: tl.constexpr, WIDE: tl.constexpr, SQUARED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    FINISH_ROWS: tl.constexpr, FINISH_WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program's partial sums; in the program that finishes last, everything that follows from them."""
    block, split = tl.program_id(0), tl.program_id(1)
    if WIDE:
        block = block.to(tl.int64)
    lane = tl.arange(0, WIDTH)[None, :]
    first = tl.zeros([ROWS, WIDTH], tl.float32)
    second = tl.zeros([ROWS, WIDTH], tl.float32)
    if NHWC:
        c = block * WIDTH + lane
        shift = tl.load(mean_ptr + c, mask=c < channels, other=0).to(tl.float32)
        pixels = samples.to(tl.int64) * PLANE if WIDE else samples * PLANE
        for start in tl.range(split * ROWS, pixels, SPLITS * ROWS, num_stages=STAGES):
            row = (start + tl.arange(0, ROWS))[:, None]
            live = (row < pixels) & (c < channels)
            x = tl.load(x_ptr + row * channels + c, mask=live, other=0).to(tl.float32)
            x = tl.where(live, x - shift, 0.0)
            first += x
            second += x * x
        own = tl.arange(0, WIDTH)
        c_at = block * WIDTH + own
        at = partial_ptr + split * channels + c_at
        tl.store(at, tl.sum(first, axis=0), mask=c_at < channels)
        tl.store(at + SPLITS * channels, tl.sum(second, axis=0), mask=c_at < channels)
    else:
        shift = tl.load(mean_ptr + block).to(tl.float32)
        CHUNKS: tl.constexpr = (PLANE + (WINDOW - 1 if WINDOW > 0 else 0) + WIDTH - 1) // WIDTH
        # One loop over planes and their chunks: what is copied ahead is the innermost loop's.
        tiles = tl.cdiv(samples - split * ROWS, SPLITS * ROWS) * CHUNKS
        for tile in tl.range(0, tiles, num_stages=STAGES):
            step = tile.to(tl.int64) if WIDE else tile
            row = (split * ROWS + step // CHUNKS * (SPLITS * ROWS) + tl.arange(0, ROWS))[:, None]
            begin = (row * channels + block) * PLANE
            at = step % CHUNKS * WIDTH + lane
            if WINDOW > 0:
                # Whole groups of 16 bytes, from the one that the plane begins in; then only its own elements.
                head = begin % WINDOW
                live = (row < samples) & (at // WINDOW * WINDOW < PLANE + head)
                x = tl.load(x_ptr + begin // WINDOW * WINDOW + at, mask=live, other=0)
                live = live & (at >= head) & (at < PLANE + head)
            else:
                live = (row < samples) & (at < PLANE)
                x = tl.load(x_ptr + begin + at, mask=live, other=0)
            x = tl.where(live, x.to(tl.float32) - shift, 0.0)
            first += x
            second += x * x
        at = partial_ptr + split * channels + block
        tl.store(at, tl.sum(tl.sum(first, axis=1), axis=0))
        tl.store(at + SPLITS * channels, tl.sum(tl.sum(second, axis=1), axis=0))
    # Nobody reads a partial sum before its program has arrived.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:
        _finish(
            partial_ptr, mean_ptr, var_ptr, average_mean_ptr, average_var_ptr, share_ptr, stats_ptr, loss_ptr,
            mean_out_ptr, var_out_ptr, channels, inverse_n, SPLITS, SQUARED, FINISH_ROWS, FINISH_WIDTH,
        )  # fmt: skip
        tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=["planes"])
def bn_statistics_backward_kernel(
    x_ptr, through_ptr, upstream_ptr, stats_ptr, grad_ptr, planes, numel,
    CHANNELS: tl.constexpr, PLANE: tl.constexpr, NHWC: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of ROWS planes, BLOCK pixels of each; with ROWS = 0 of BLOCK elements in a row."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    if ROWS > 0:
        row = (pid * ROWS + tl.arange(0, ROWS))[:, None]
        pixel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
        at = row * PLANE + pixel
        live = (row < planes) & (pixel < PLANE)
        c = row % CHANNELS
    else:
        at = pid * BLOCK + tl.arange(0, BLOCK)
        live = at < numel
        c = at % CHANNELS if NHWC else at // PLANE % CHANNELS
    upstream = tl.load(upstream_ptr).to(tl.float32)
    mean = tl.load(stats_ptr + c)
    a = tl.load(stats_ptr + 2 * CHANNELS + c) * upstream
    b = tl.load(stats_ptr + 3 * CHANNELS + c) * upstream
    grad = a + b * (tl.load(x_ptr + at, mask=live, other=0).to(tl.float32) - mean)
    if through_ptr is not None:
        grad += tl.load(through_ptr + at, mask=live, other=0).to(tl.float32)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=live)


def _geometry(x: torch.Tensor) -> tuple[int, int, int, bool]:
    """(N, C, pixels, whether channels are innermost) of a dense input."""
    samples, channels = x.shape[:2]
    plane = x.numel() // (samples * channels)
    return samples, channels, plane, plane == 1 or not x.is_contiguous()


def bn_statistics(
    x: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    average_mean: torch.Tensor | None,
    average_var: torch.Tensor | None,
    share: torch.Tensor | None,
    *,
    squared: bool,
    mean: torch.Tensor | None = None,
    var: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward once.

    Args:
        x: ``[N, C, …]`` with elements, dense with channels second or last; float32, bfloat16 or float16.
        running_mean: μ ``[C]``, contiguous.
        running_var: σ² likewise.
        average_mean: float32 ``[C]``, contiguous, or None.
        average_var: Likewise.
        share: k, 0-d, or None for 0.
        squared: Squared norms.
        mean: Written where given, float32 ``[C]``: the batch's, once more; with ``var``.
        var: Likewise.

    Returns:
        The loss, 0-d, and ``[4, C]``: mean, var, a, b; all float32.
    """
    channels, given = x.shape[1], (x, running_mean, running_var, average_mean, average_var, share)
    found = _FORWARD.find_by((*given, mean, var), (), (squared,), lambda: (_geometry(x), x.itemsize, squared))
    partial, counter, one = reduction(x.device, 2 * found.grid[1] * channels)
    loss, stats = torch.empty_like(one), one.new_empty((4, channels))
    found((*given, stats, loss, mean, var, partial, counter))
    return loss, stats


def _planned(sizes: tuple[int, int, int, bool], itemsize: int, squared: bool) -> Planned:
    samples, channels, plane, nhwc = sizes
    plan = statistics_plan(samples, channels, plane, itemsize, nhwc)
    constants = {
        "PLANE": plane,
        "NHWC": nhwc,
        "WIDE": samples * channels * plane >= 2**31 - 2**16,
        "SQUARED": squared,
        "ROWS": plan.rows,
        "WIDTH": plan.width,
        "WINDOW": plan.window,
        "SPLITS": plan.splits,
        "STAGES": plan.stages,
        "FINISH_ROWS": plan.finish_rows,
        "FINISH_WIDTH": plan.finish_width,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    grid = (triton.cdiv(channels, plan.width) if nhwc else channels, plan.splits)
    return grid, (samples, channels, 1.0 / (samples * plane)), constants


_FORWARD = Launches(bn_statistics_kernel, _planned)


def bn_statistics_backward(
    x: torch.Tensor,
    stats: torch.Tensor,
    upstream: torch.Tensor,
    through: torch.Tensor | None,
    grad: torch.Tensor,
) -> None:
    """Launch the backward once, into ``grad``.

    Args:
        x: As given to :func:`bn_statistics`.
        stats: As returned by it.
        upstream: Gradient of the loss, 0-d.
        through: Gradient that is added, dense as x, or None.
        grad: Written, dense as x.
    """
    varying = (x, through, upstream, stats, grad)
    _BACKWARD.find_by(varying, (), (), lambda: (_geometry(x), x.itemsize))(varying)


def _planned_backward(sizes: tuple[int, int, int, bool], itemsize: int) -> Planned:
    samples, channels, plane, nhwc = sizes
    planes = samples * channels
    block = min(triton.next_power_of_2(plane), 1024)
    by_planes = not nhwc and plane % (16 // itemsize) == 0 and triton.cdiv(plane, block) <= MAX_GRID_Y
    block = block if by_planes else 1024
    rows = 1024 // block if by_planes else 0
    constants = {
        "CHANNELS": channels,
        "PLANE": plane,
        "NHWC": nhwc,
        "WIDE": planes * plane >= 2**31 - 2**16,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    numel = planes * plane
    grid = (
        (triton.cdiv(planes, rows), triton.cdiv(plane, block)) if by_planes else (triton.cdiv(numel, block),)
    )
    return grid, (planes, numel), constants


_BACKWARD = Launches(bn_statistics_backward_kernel, _planned_backward)
