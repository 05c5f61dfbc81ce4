"""The launch plans of sample, update and add."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from ..machine import chosen_machine

#: Rows of an update that are compared each with each; above, sorting takes less.
COMPARED = 1 << 14
#: Rows above this are gathered by a launch of their own.
FUSED_ROW_BYTES = 16 * 1024
#: What one program of that launch moves.
GATHER_BYTES = 8 * 1024


@dataclass(frozen=True)
class ReplayPlan:
    """What one launch looks like.

    Attributes:
        rows: Draws or rows a program handles.
        num_warps: Warps a program.
        block: Elements of a row that a program moves at a time.
    """

    rows: int
    num_warps: int
    block: int = 0


def interpreting() -> bool:
    """Whether kernels run in the interpreter, and for its own sake: not planned for another machine."""
    return bool(triton.knobs.runtime.interpret) and chosen_machine() is None


def sample_plan(row_words: int) -> ReplayPlan:
    """One draw a program: the descent is latency, and a GPU hides it best with many programs.

    The interpreter pays per program instead, so there it is 32. One warp: wider ones would meet in shared memory
    at each level's scan.
    """
    block = min(1024, triton.next_power_of_2(max(1, row_words)))
    return ReplayPlan(32, 1, block) if interpreting() else ReplayPlan(1, 1, block)


def update_plan() -> ReplayPlan:
    """32 rows a program against all of the batch: the whole square in one program spills."""
    return ReplayPlan(32, 4, 128)


def add_plan(row_words: int) -> ReplayPlan:
    """One row a program, in the interpreter 32."""
    return sample_plan(row_words)
