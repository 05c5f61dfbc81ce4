"""How many rows' logits are alive at a time. Without Triton: the CPU takes chunks, too."""

from __future__ import annotations

from typing import Literal

__all__ = ["CHUNK_BYTES", "chunks_alive", "default_chunk_rows"]

#: What all chunks that are alive at a time may take: 512 MiB.
CHUNK_BYTES = 2**29
#: Rows of a matrix product's tile.
TILE = 128


def chunks_alive(
    num_classes: int,
    divergence: Literal["forward_kl", "another"] | None,
    *,
    labels: bool,
    head: bool,
    softcap: bool,
) -> int:
    """Tensors ``[chunk rows, V]`` that are alive at a time on the kernels, gradients included.

    Args:
        num_classes: V.
        divergence: ``"forward_kl"``, at one temperature and to logits of all classes: its kernel writes the gradient
            over the student's logits. ``"another"``; or None, the cross-entropy alone.
        labels: Whether there is a cross-entropy.
        head: Whether the teacher's logits are computed here.
        softcap: Whether the student's logits are capped, so that they are needed after the gradient.
    """
    in_place = divergence == "forward_kl" and num_classes % 8 == 0 and not softcap
    # A cross-entropy of its own lies over the teacher's logits, or beside those that were given.
    own = labels and divergence == "another" and not head
    return 1 + head + (not in_place) + own


def default_chunk_rows(num_classes: int, *, itemsize: int = 4, chunks: int = 2) -> int:
    """As many rows as :data:`CHUNK_BYTES` allows, in whole tiles of a matrix product, at least one tile.

    Args:
        num_classes: V.
        itemsize: Bytes of a logit: 4, or 8 in float64.
        chunks: Of :func:`chunks_alive`.
    """
    row = max(1, num_classes) * itemsize * chunks
    return max(TILE, CHUNK_BYTES // row // TILE * TILE)
