"""Which samples make up which batch: the order of an epoch, told from the seed alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Schedule:
    """The batches of one rank.

    Every rank has the same number of batches, so that collectives meet. With ``last_batch="partial"`` each
    sample comes exactly once over all ranks, and a rank's last batch may be short. With ``"fill"`` all
    batches are full and the epoch's first samples come again to fill the last ones. Nothing is ever dropped.

    Shuffling is a full permutation, new for each epoch: samples are read by position, so there is no window
    within which they would have to be mixed.
    """

    samples: int
    batch_size: int
    shuffle: bool
    seed: int
    rank: int
    world_size: int
    last_batch: Literal["partial", "fill"]

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}; must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}; must be in [0, 2**63)")
        if self.last_batch not in ("partial", "fill"):
            raise ValueError(f"last_batch: got {self.last_batch!r}; accepted: 'partial', 'fill'")
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: got rank {self.rank} of world_size {self.world_size}")
        if self.world_size > self.samples:
            raise ValueError(
                f"world_size: got {self.world_size} ranks for {self.samples} usable samples; "
                "some would have nothing to do: use fewer ranks or more data"
            )

    def __len__(self) -> int:
        per_rank = -(-self.samples // self.world_size)
        return -(-per_rank // self.batch_size)

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The sample numbers of each of this rank's batches in an epoch."""
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        else:
            order = np.arange(self.samples)
        if self.last_batch == "fill":
            order = np.resize(order, len(self) * self.batch_size * self.world_size)
        mine = order[self.rank :: self.world_size].astype(np.int64)
        # A rank that holds one sample less might find its last batch empty; let an earlier one be short
        # instead.
        steps = np.arange(len(self) + 1)
        bounds = np.minimum(steps * self.batch_size, len(mine) - steps[::-1]).clip(0)
        return [mine[start:stop] for start, stop in itertools.pairwise(bounds)]
