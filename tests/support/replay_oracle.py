"""Prioritized replay in Python integers and float64, independent of csrc/ and kernels/."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

STREAM = 0x5245504C
WORD = 0xFFFFFFFF


def philox(key: int, counter: Sequence[int]) -> tuple[int, ...]:
    """Philox-4x32-10, as printed in Salmon et al. (SC 2011)."""
    k0, k1 = key & WORD, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def uniform(seed: int, step: int, draw: int) -> int:
    """64 bits of a draw."""
    words = philox(seed, (draw >> 1, STREAM, step & WORD, step >> 32))
    low, high = words[2 * (draw & 1) :][:2]
    return low | high << 32


def quantum(delta: float, alpha: float, eps: float, scale: float) -> int:
    """clip(round((|δ| + ε)^α · scale), 1, 2³² − 1)."""
    base = abs(delta) + eps
    mass = (base**alpha if base or alpha else 1.0) * scale
    return min(max(round(min(mass, 2.0**40)), 1), 2**32 - 1)


def targets(total: int, count: int, seed: int, step: int, stratified: bool = True) -> list[int]:
    """Where each draw falls in [0, total)."""
    out = []
    for i in range(count):
        low, high = (i * total // count, (i + 1) * total // count) if stratified else (0, total)
        out.append(low + (uniform(seed, step, i) * (high - low) >> 64))
    return out


def find(masses: Sequence[int], target: int) -> int:
    """The slot whose prefix interval holds the target."""
    for slot, mass in enumerate(masses):
        if target < mass:
            return slot
        target -= mass
    raise AssertionError("target beyond the total")


def weight(masses: Sequence[int], slot: int, beta: float) -> float:
    """(N·P)^−β."""
    live = sum(mass > 0 for mass in masses)
    return float(Fraction(live * masses[slot], sum(masses))) ** -beta if masses[slot] else math.nan
