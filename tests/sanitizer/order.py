"""What a ticket orders: the rule that a checker of races between programs needs for reductions in one launch.

A kernel that reduces in its launch ends with an atomic add of release and acquire order, the *ticket*: whoever takes
the last one reads what all others stored before they took theirs. An interpreter that runs programs one after another
sees a store and a load of two programs and cannot know that. Here the access log is cut into parts in which no pair
is ordered by a ticket, and each part is searched by itself; no pair of accesses that a ticket leaves unordered is lost.

An entry of the log is ``(program, kind, operation, addresses, bytes an element, values)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Entry = tuple[Any, ...]
#: How Triton's IR writes a memory order of acquire and release.
ACQUIRE_RELEASE = ("sem = 4", "acq_rel")
#: Stands for every program but the one that came last.
OTHERS = "another"


def is_ticket(entry: Entry) -> bool:
    """Whether an access is an atomic update that orders what is before it and after it."""
    return entry[1] == "a" and any(word in entry[2] for word in ACQUIRE_RELEASE)


def parts(log: list[Entry]) -> Iterator[list[Entry]]:
    """Sub-logs that together hold every pair of accesses that no ticket orders, and none that one does.

    First everything but what the last program to take a ticket did after it. Then, for each such program, that, with
    what the others did after *their* tickets, and with all that those did who never took this one.
    """
    taken: dict[
        int, dict[Any, int]
    ] = {}  # address of a ticket -> program -> where in the log it took it, at last
    for at, entry in enumerate(log):
        if is_ticket(entry):
            for address in entry[3]:
                taken.setdefault(int(address), {})[entry[0]] = at
    after: dict[Any, tuple[int, list[dict[Any, int]]]] = {}  # last program -> where it was last, its tickets
    for programs in taken.values():
        last = max(programs, key=lambda program: programs[program])
        since, groups = after.get(last, (programs[last], []))
        after[last] = min(since, programs[last]), [*groups, programs]
    if not after:
        yield log
        return
    yield [entry for at, entry in enumerate(log) if entry[0] not in after or at <= after[entry[0]][0]]
    for last, (since, groups) in after.items():
        late = [entry for at, entry in enumerate(log) if entry[0] == last and at > since]
        spans = [(int(entry[3].min()), int(entry[3].max()) + entry[4]) for entry in late if len(entry[3])]
        if not spans:
            continue
        low, high = min(span[0] for span in spans), max(span[1] for span in spans)
        # Which of the others' accesses the ticket came after: those before their own, of any ticket of the group.
        unordered = [
            (OTHERS, *entry[1:])  # as one: what they do to each other is for the first part to find
            for at, entry in enumerate(log)
            if entry[0] != last
            and at > max(group.get(entry[0], -1) for group in groups)
            and len(entry[3])
            and int(entry[3].min()) < high
            and int(entry[3].max()) + entry[4] > low
        ]
        yield [*unordered, *late]


def respecting_tickets(find: Callable[[list[Entry]], Any]) -> Callable[[list[Entry] | None], Any]:
    """A finder of races that searches each part; the first race of any, or None."""

    def search(log: list[Entry] | None) -> Any:
        for part in parts(log or []):
            race = find(part)
            if race is not None:
                return race
        return None

    return search
