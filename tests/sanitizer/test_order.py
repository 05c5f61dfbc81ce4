"""The rule of tickets, on made-up logs: what it orders is not a race, and everything else still is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.conftest import INTERPRETING
from tests.sanitizer.order import respecting_tickets

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")
TICKET, PLAIN = "atomic_rmw sem = 4 : i32", "a load or a store"


def access(program: int, kind: str, address: int, operation: str = PLAIN) -> tuple[Any, ...]:
    return (program, kind, operation, np.array([address]), 4, None)


def ticket(program: int, address: int = 0) -> tuple[Any, ...]:
    return access(program, "a", address, TICKET)


def pairs(log: list[tuple[Any, ...]]) -> Any:
    """The first address that one program stores to and another touches; a finder of races in a dozen words."""
    for first, second in itertools.combinations(log, 2):
        plain = "a" not in (first[1], second[1])
        if plain and first[0] != second[0] and "w" in (first[1], second[1]) and first[3][0] == second[3][0]:
            return int(first[3][0])
    return None


find = respecting_tickets(pairs)
#: Two programs store a partial sum each and take a ticket; the last one loads both and stores the result.
REDUCTION = [
    access(0, "w", 100),
    ticket(0),
    access(1, "w", 104),
    ticket(1),
    access(1, "r", 100),
    access(1, "w", 200),
]


def test_a_reduction_by_whoever_comes_last_is_no_race() -> None:
    assert pairs(REDUCTION) == 100  # what a checker says that knows no tickets
    assert find(REDUCTION) is None
    assert find([]) is None
    assert find(None) is None


def test_without_the_ticket_it_is_one() -> None:
    relaxed = [access(e[0], "a", 0, "atomic_rmw sem = 1 : i32") if e[1] == "a" else e for e in REDUCTION]
    assert find(relaxed) == 100


def test_a_store_after_the_ticket_is_one() -> None:
    late = [ticket(0), access(0, "w", 100), ticket(1), access(1, "r", 100)]
    assert find(late) == 100


def test_stores_of_two_programs_before_their_tickets_are_one() -> None:
    assert find([access(0, "w", 100), ticket(0), access(1, "w", 100), ticket(1)]) == 100


def test_a_program_of_another_group_is_not_ordered() -> None:
    """Channel blocks have a ticket each: the last of one knows nothing of the stores of another."""
    two = [
        *(access(0, "w", 100), ticket(0, 0), access(1, "w", 104), ticket(1, 4)),
        *(access(2, "w", 108), ticket(2, 0), access(2, "r", 100)),
        *(access(3, "w", 112), ticket(3, 4), access(3, "r", 104)),
    ]
    assert find(two) is None
    assert find([*two, access(3, "r", 100)]) == 100
    assert find([*two, access(2, "w", 112)]) == 112


def test_a_program_without_a_ticket_is_not_ordered() -> None:
    assert find([access(7, "w", 100), *REDUCTION]) == 100
    assert find([*REDUCTION, access(7, "r", 200)]) == 200
