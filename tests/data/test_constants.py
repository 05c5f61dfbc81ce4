"""Numbers that are copied to a device once."""

from __future__ import annotations

import pytest
import torch

from kdfast import constants
from kdfast.constants import constant


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "_kept", {})


def test_the_same_numbers_are_one_tensor() -> None:
    first = constant((0.5, 2.0), "cpu")
    torch.testing.assert_close(first, torch.tensor([0.5, 2.0]))
    assert constant((0.5, 2.0), torch.device("cpu")) is first
    assert constant((0.5, 2.0), "cpu", torch.float64) is not first
    assert constant((0.5, 2.0), "meta") is not first


def test_what_is_made_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        made = constant((3.0,), "cpu")
    x = torch.ones(1, requires_grad=True)
    (x * made).backward()
    torch.testing.assert_close(x.grad, torch.tensor([3.0]))


def test_nothing_is_dropped_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph goes on reading what it was captured with, however many numbers follow."""
    monkeypatch.setattr(constants, "LIMIT", 3)
    kept = [constant((float(n),), "cpu") for n in range(3)]
    for n in range(100, 110):
        torch.testing.assert_close(constant((float(n),), "cpu"), torch.tensor([float(n)]))
    assert len(constants._kept) == 3
    assert [constant((float(n),), "cpu") for n in range(3)] == kept
