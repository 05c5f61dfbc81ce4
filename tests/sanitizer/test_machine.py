"""What ``torch`` answers under the sanitizer, on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import INTERPRETING
from tests.sanitizer.machine import answers, pretend

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver locks pages itself")
def test_a_page_locked_copy_needs_no_driver_and_shares_no_memory() -> None:
    table = torch.arange(3.0)
    undo = pretend(90)
    try:
        locked = table.pin_memory()
    finally:
        undo()
    assert torch.equal(locked, table)
    assert locked.data_ptr() != table.data_ptr()
    with pytest.raises(RuntimeError):  # torch's own again
        table.pin_memory()


def test_every_answer_is_taken_back() -> None:
    owners = {name: torch.cuda for name in answers(80)} | dict.fromkeys(("mm", "addmm"), torch)
    before = {name: getattr(owner, name) for name, owner in owners.items()}
    undo = pretend(80)
    assert all(getattr(owner, name) is not before[name] for name, owner in owners.items())
    undo()
    assert {name: getattr(owner, name) for name, owner in owners.items()} == before


def test_machines_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match="capability: got 75"):
        answers(75)
