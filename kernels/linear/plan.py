"""How many rows' logits are alive at a time. Without Triton: the CPU takes chunks, too."""

from __future__ import annotations

__all__ = ["CHUNK_ELEMENTS", "default_chunk_rows"]

#: Elements of one network's logits that are alive at a time: 256 MiB in float32.
CHUNK_ELEMENTS = 2**26


def default_chunk_rows(num_classes: int) -> int:
    """As many rows as :data:`CHUNK_ELEMENTS` allows, in whole tiles of a matrix product, at least one tile."""
    return max(128, CHUNK_ELEMENTS // max(1, num_classes) // 128 * 128)
