"""What the boundary walk costs beside the teacher's passes that it is made of."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from kdfast.data import decision_boundary_pairs
from kdfast.models import create_model

STEPS = 10


@pytest.mark.slow
def test_pairs_cost_at_most_a_tenth_more_than_their_teacher_passes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CPU time, fastest of five, in turns: forward and backward passes with the walk around them, and as many alone."""
    model = create_model("resnet8", 10).eval().requires_grad_(False)
    images = torch.rand(64, 3, 16, 16)
    targets = model(images).topk(2).indices[:, 1]  # within reach

    count = [0]

    def counted(x: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        return model(x)

    decision_boundary_pairs(counted, images, targets, steps=STEPS)
    assert STEPS + 1 <= count[0] <= STEPS + 2  # one for the pairs' own classes, if there are pairs

    def passes() -> None:
        for _ in range(count[0]):
            leaf = images.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(leaf), targets, reduction="sum"), leaf)

    def walk() -> None:
        decision_boundary_pairs(model, images, targets, steps=STEPS)

    def seconds(work: Callable[[], None]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    seconds(passes), seconds(walk)
    taken = [(seconds(passes), seconds(walk)) for _ in range(5)]
    alone, around = (min(column) for column in zip(*taken))
    with capsys.disabled():
        print(
            f"\nboundary pairs: {around / alone:.3f} x their {count[0]} teacher passes ({1000 * alone:.0f} ms)"
        )
    assert around <= 1.1 * alone
