"""Rounds and steps on the kernels (views, statistics, losses, replay together) are those of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdfast
from tests.conftest import Target
from tests.support.ssdkd import method

TINY: dict[str, Any] = {
    "capacity": 6,
    "synthesis_batch": 3,
    "inversion_steps": 2,
    "fill_epochs": 0,
    "reset_round": None,
}


def walk(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = method(**TINY, batch_size=4, device=device)
    images = [made.synthesize() for _ in range(2)]
    loss = made.step()
    loss.backward()
    gradient = made.student.conv1.weight.grad
    assert gradient is not None
    return torch.cat(images).cpu(), loss.detach().cpu(), gradient.cpu()


def test_rounds_and_steps_on_the_kernels_are_the_references(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("it would be compared with itself")
    images, loss, gradient = walk(target.device)
    with kdfast.use_backend("reference"):
        wanted_images, wanted_loss, wanted_gradient = walk(target.device)
    # Rounded to 8 bits: a value on the edge may fall on either side of it.
    assert int((images.int() - wanted_images.int()).abs().max()) <= 1
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=5e-2, atol=5e-3)
