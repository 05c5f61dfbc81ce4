"""Uniform 64-bit draws from Philox-4x32-10 (Salmon et al., SC 2011), the same bits as csrc/philox.hpp.

Draw i of step t is a pure function of (seed, t, i): block i // 2 of the counter (i // 2, stream, t mod 2³²,
t // 2³²), low or high half. No state but the step, so programs need not talk to each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Keeps replay's stream apart from other users of the same seed ("REPL").
REPLAY_STREAM = tl.constexpr(0x5245504C)


@triton.jit
def uniform_u64(seed, step, draw):  # type: ignore[no-untyped-def]
    """64 uniform bits for each element of ``draw`` (int64); ``seed`` and ``step`` are int64 scalars."""
    block = (draw >> 1).to(tl.uint32)
    zero = block * 0
    low = zero + (step & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed.to(tl.uint64, bitcast=True), block, zero + REPLAY_STREAM, low, high)
    odd = (draw & 1) != 0
    bottom = tl.where(odd, r2, r0).to(tl.uint64)
    top = tl.where(odd, r3, r1).to(tl.uint64)
    return bottom | (top << 32)
