"""What ``kdfast select`` is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import annotated_types as at

from kdfast.experiments.common.bounds import Count
from kdfast.experiments.common.teacher_view import LookRecipe


@dataclass(frozen=True, kw_only=True)
class SelectConfig(LookRecipe):
    """How many images, chosen how, beside what the teacher looks at; its predictions decide.

    Attributes:
        budget: Images to pick; of fewer shards' images, as many as there are. Fewer real images stay as they are, as in
            the paper.
        shared: Class names or numbers that data and teacher share, one a line in this file: makes two subsets,
            ``in-domain`` of these classes and ``out-of-domain`` of the others. For data with true labels.
        long_tail: Instead of equal shares, ones that fall off exponentially; largest over smallest, e.g. 100.
        index_only: Write no shards but ``indices.txt``, the picked images' numbers, one a line.
        entropy_images: How many of the picked images those are measured on.
        image_size: Side that labelled images are stored with; by default the teacher's. Shards' files stay as they are.
        samples_per_shard: Images a shard.
        quality: JPEG quality, for labelled images.
        resume: Go on where an earlier run stopped.
    """

    budget: Count = 50_000
    shared: str | None = None
    long_tail: Annotated[float, at.Ge(1), at.Lt(math.inf)] | None = None
    index_only: bool = False
    entropy_images: Count = 2000
    image_size: Count | None = None
    samples_per_shard: Count = 1000
    quality: Annotated[int, at.Ge(1), at.Le(100)] = 95
    resume: bool = False
