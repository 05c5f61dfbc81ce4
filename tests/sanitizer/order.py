"""What a ticket orders: the rule that a checker of races between programs needs for reductions in one launch.

A kernel that reduces in its launch ends with an atomic add of release and acquire order, the *ticket*: whoever takes
the last one reads what all others stored before they took theirs. An interpreter that runs programs one after another
sees a store and a load of two programs and cannot know that. A kernel whose programs wait for each other counts with
release order, and waits by reading the count with acquire order: what it does then comes after what all that have
counted there did before. Here the access log is cut into parts in which no pair is ordered so, and each part is
searched by itself; no pair of accesses that is left unordered is lost.

An entry of the log is ``(program, kind, operation, addresses, bytes an element, values)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

Entry = tuple[Any, ...]
#: How Triton's IR writes memory orders: of acquire and release, of each alone.
ACQUIRE_RELEASE, ACQUIRE, RELEASE = ("sem = 4", "acq_rel"), ("sem = 2", "acquire"), ("sem = 3", "release")
#: Stands for every program but the one that came last.
OTHERS = "another"


#: Where in the log each of some programs counted, at last.
Group = dict[Any, int]


def is_atomic(entry: Entry, order: tuple[str, ...]) -> bool:
    """Whether an access is an atomic update of this memory order."""
    return entry[1] == "a" and any(word in entry[2] for word in order)


def is_ticket(entry: Entry) -> bool:
    """Whether an access is an atomic update that orders what is before it and after it."""
    return is_atomic(entry, ACQUIRE_RELEASE)


def counts(entry: Entry) -> bool:
    """Whether others may be ordered after what its program did before it."""
    return is_ticket(entry) or is_atomic(entry, RELEASE)


def orderings(log: list[Entry]) -> dict[Any, list[tuple[int, Group]]]:
    """Of each program that is ordered after others: where in the log, and after what of whom, in the log's order.

    That is, after the last ticket of an address; and after a wait that has seen every program that ever counts there.
    (A wait that has not may have come too early.)
    """
    taken: dict[int, Group] = {}
    counted: dict[int, Group] = {}
    waits: list[tuple[int, Any, int]] = []
    for at, entry in enumerate(log):
        if counts(entry):
            for address in entry[3]:
                (taken if is_ticket(entry) else counted).setdefault(int(address), {})[entry[0]] = at
        if is_atomic(entry, ACQUIRE):
            waits += [(at, entry[0], int(address)) for address in entry[3]]
    after: dict[Any, list[tuple[int, Group]]] = {}
    for programs in taken.values():
        last = max(programs, key=lambda program: programs[program])
        after.setdefault(last, []).append((programs[last], programs))
    for at, program, address in waits:
        programs = counted.get(address, {})
        if programs and max(programs.values()) < at:
            after.setdefault(program, []).append((at, programs))
    return {program: sorted(found, key=lambda one: one[0]) for program, found in after.items()}


def parts(log: list[Entry]) -> Iterator[list[Entry]]:
    """Sub-logs that together hold every pair of accesses that nothing orders, and none that something does.

    First everything but what programs did after they were ordered after others. Then, for each such program, what it
    did from there until it counted or was ordered again, with what the others did neither before they counted for it
    nor after they were ordered after it.
    """
    after = orderings(log)
    if not after:
        yield log
        return
    yield [entry for at, entry in enumerate(log) if entry[0] not in after or at <= after[entry[0]][0][0]]
    spans = [
        (int(entry[3].min()), int(entry[3].max()) + entry[4]) if len(entry[3]) else None for entry in log
    ]
    for program, found in after.items():
        own = [at for at, entry in enumerate(log) if entry[0] == program]
        first = found[0][0]
        cuts = {at for at, _ in found} | {at for at in own if at > first and counts(log[at])}
        cuts.add(len(log))
        for since, until in itertools.pairwise(sorted(cuts)):
            late = [at for at in own if since < at <= until and spans[at] is not None]
            if not late:
                continue
            before = [group for at, group in found if at <= since]
            # Of the others, from where on they come after this.
            then = {
                other: min((at for at, group in theirs if group.get(program, -1) >= until), default=len(log))
                for other, theirs in after.items()
            }
            reached = [span for at in late if (span := spans[at]) is not None]
            low, high = min(span[0] for span in reached), max(span[1] for span in reached)
            unordered = [
                (OTHERS, *entry[1:])  # as one: what they do to each other is for other parts to find
                for at, (entry, span) in enumerate(zip(log, spans, strict=True))
                if span is not None
                and span[0] < high
                and span[1] > low
                and entry[0] != program
                and max(group.get(entry[0], -1) for group in before) < at <= then.get(entry[0], at)
            ]
            yield [*unordered, *(log[at] for at in late)]


def respecting_tickets(find: Callable[[list[Entry]], Any]) -> Callable[[list[Entry] | None], Any]:
    """A finder of races that searches each part; the first race of any, or None."""

    def search(log: list[Entry] | None) -> Any:
        for part in parts(log or []):
            race = find(part)
            if race is not None:
                return race
        return None

    return search
