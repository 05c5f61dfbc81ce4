"""The kernel of crop, flip and normalise; the equation is in the package."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch", "padding"])
def crop_flip_kernel(
    x_ptr, y_ptr, offsets_ptr, flips_ptr, gain_ptr, bias_ptr,
    batch, padding, x_sample, x_channel, x_row, x_column, x_height, x_width, numel,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of y ``[batch, CHANNELS, HEIGHT, WIDTH]`` of one sample: of the crop, or of the image's gradient."""
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    live = at < numel
    if CHANNELS_LAST:
        channel = at % CHANNELS
        column = at // CHANNELS % WIDTH
        row = at // (CHANNELS * WIDTH)
    else:
        column = at % WIDTH
        row = at // WIDTH % HEIGHT
        channel = at // (WIDTH * HEIGHT)
    gain = tl.load(gain_ptr + channel, mask=live, other=0)
    for b in range(tl.program_id(1), batch, tl.num_programs(1)):
        sample = tl.full([], 0, tl.int64) + b
        down = tl.load(offsets_ptr + 2 * sample).to(tl.int64) - padding
        right = tl.load(offsets_ptr + 2 * sample + 1).to(tl.int64) - padding
        # Beyond any border is beyond it: what follows may then be 32-bit, however wild the offset.
        down = tl.minimum(tl.maximum(down, -(1 << 24)), 1 << 24).to(tl.int32)
        right = tl.minimum(tl.maximum(right, -(1 << 24)), 1 << 24).to(tl.int32)
        flipped = tl.load(flips_ptr + sample) != 0
        if TRANSPOSED:
            x_at = row - down
            uncut = column - right
            y_at = tl.where(flipped, x_width - 1 - uncut, uncut)
        else:
            x_at = row + down
            y_at = tl.where(flipped, WIDTH - 1 - column, column) + right
        inside = live & (x_at >= 0) & (x_at < x_height) & (y_at >= 0) & (y_at < x_width)
        source = x_ptr + sample * x_sample + (channel * x_channel + x_at * x_row + y_at * x_column)
        value = tl.load(source, mask=inside, other=0).to(tl.float32) * gain
        if bias_ptr is not None:
            value += tl.load(bias_ptr + channel, mask=live, other=0)
        tl.store(y_ptr + sample * numel + at, value.to(y_ptr.dtype.element_ty), mask=live)
