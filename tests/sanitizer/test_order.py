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
WAIT, COUNT = "atomic_rmw sem = 2 : i32", "atomic_rmw sem = 3 : i32"


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


#: Two programs store a part each and count; two others wait for them and read both.
WAITING = [
    *(access(0, "w", 100), access(0, "a", 0, COUNT), access(1, "w", 104), access(1, "a", 0, COUNT)),
    *(access(2, "a", 0, WAIT), access(2, "r", 100), access(2, "w", 200)),
    *(access(3, "a", 0, WAIT), access(3, "r", 104), access(3, "w", 204)),
]


def test_what_all_wait_for_is_no_race() -> None:
    assert pairs(WAITING) == 100
    assert find(WAITING) is None


@pytest.mark.parametrize(
    "late",
    [
        access(1, "w", 104),  # after it has counted
        access(2, "w", 204),  # two that wait are not ordered by that
        access(4, "r", 100),  # waits for nobody
        access(4, "a", 0, COUNT),  # the others have not waited for this one
    ],
)
def test_what_waits_leave_unordered_is_one(late: tuple[Any, ...]) -> None:
    assert find([*WAITING, late]) is not None


def test_a_wait_orders_nothing_before_it() -> None:
    assert find([access(2, "r", 100), *WAITING]) == 100


def test_a_program_that_is_ordered_twice_is_so_step_by_step() -> None:
    """After the first wait nothing is known of whom the second is for."""
    second = [access(4, "w", 300), access(4, "a", 8, COUNT)]
    waits = [access(2, "a", 8, WAIT), access(2, "r", 300)]
    assert find([*second, *WAITING, *waits]) is None
    assert find([*second, *WAITING, *reversed(waits)]) == 300


def test_who_comes_last_is_ordered_after_those_that_have_waited() -> None:
    """Both that waited leave a sum; the last of them to take a ticket reads the other's."""
    sums = [access(2, "w", 300), ticket(2, 8), access(3, "w", 304), ticket(3, 8), access(3, "r", 300)]
    assert find([*WAITING, *sums]) is None
    assert find([*WAITING, ticket(2, 8), access(2, "w", 300), *sums[2:]]) == 300
