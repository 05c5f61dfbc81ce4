"""The launch plan of the denoising step."""

from __future__ import annotations

from dataclasses import dataclass

#: Where a program of few elements is better: below this many, small blocks fill more multiprocessors.
SMALL = 1 << 18


@dataclass(frozen=True)
class StepPlan:
    """What one launch looks like: elements a program, and its warps."""

    block: int
    num_warps: int


def step_plan(numel: int) -> StepPlan:
    """Eight elements a thread; one warp a program while the whole tensor is small."""
    return StepPlan(1024, 4) if numel >= SMALL else StepPlan(256, 1)
