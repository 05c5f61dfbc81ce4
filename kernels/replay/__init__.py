"""Prioritized replay on the GPU: sample, update, add, rebuild. Bitwise equal to the C++ core in csrc/.

    q_i = clip(round((|δ_i| + ε)^α · scale), 1, 2³² − 1)     u32 leaves, u64 sums of 256 each, S the root
    P_i = q_i / S,   w_i = (N·P_i)^−β                        SSD-KD Eq. 5 (Schaul et al. 2016)

Integer sums are associative: atomic adds in any order leave the same bits, and the root is always exactly the
sum of the leaves. Powers come from + − × / on float64 in the order of csrc/fixed_point.hpp, with fusion off.

Bytes moved a drawn row: 2R for the row (R bytes; R + 4·R when normalised from uint8), 256·(8·(levels − 1) + 4)
for the descent (4.6 KB of L2 reads at three levels), 48 for what describes it. Update: 20 a row, 8 a level.

Launch plan: one launch for `sample` (two when rows exceed 16 KB: then the gather has its own, with a program for every
8 KB), one for `update`, one for `add`. None of them syncs; each may be captured in a CUDA graph, since what
changes between replays (draw counter, head of the ring, running maximum) lives in device memory. The draw counter
advances when the last program of `sample` is done, so every replay draws anew.
"""

from .launch import add, rebuild, sample, update

__all__ = ["add", "rebuild", "sample", "update"]
