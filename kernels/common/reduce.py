"""The last reduction of a launch, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reduce_last(partial, loss_ptr, partial_ptr, counter_ptr, BLOCK: tl.constexpr):
    """Sum the programs' partial losses in a fixed order, in the program that finishes last."""
    tl.store(partial_ptr + tl.program_id(0), partial)
    sum_last(tl.num_programs(0), loss_ptr, partial_ptr, counter_ptr, BLOCK)


@triton.jit
def sum_last(count, loss_ptr, partial_ptr, counter_ptr, BLOCK: tl.constexpr):
    """Sum ``count`` partial losses, which programs have stored one by one, in the program that finishes last."""
    # Scalar stores, then a release: nobody reads a partial before its program's counter has moved.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, count, BLOCK):
            index = start + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr + index, mask=index < count, other=0.0, volatile=True)
        tl.store(loss_ptr, tl.sum(total, axis=0))
        tl.store(counter_ptr, 0)
