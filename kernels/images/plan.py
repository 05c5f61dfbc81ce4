"""The launch plan of crop, flip and normalise."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImagesPlan:
    """Elements a program, and its warps."""

    block: int
    num_warps: int


def images_plan(numel: int) -> ImagesPlan:
    """Eight elements a thread, so that 16-bit results are stored 16 bytes wide; ``numel`` of one sample."""
    return ImagesPlan(1024, 4) if numel >= 2048 else ImagesPlan(256, 1)
