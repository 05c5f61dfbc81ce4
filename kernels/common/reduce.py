"""The last reduction of a launch, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reduce_last(partial, loss_ptr, partial_ptr, counter_ptr, BLOCK: tl.constexpr):
    """Sum the programs' partial losses in a fixed order, in the program that finishes last."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partial_ptr + pid, partial)
    # One scalar store a program, then a release: nobody reads a partial before its counter has moved.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == programs - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, programs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr + index, mask=index < programs, other=0.0, volatile=True)
        tl.store(loss_ptr, tl.sum(total, axis=0))
        tl.store(counter_ptr, 0)
