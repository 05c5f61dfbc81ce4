"""Finishing one batch while the next is sampled: a thread, a bounded queue, and errors that reach the caller."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Does ``work`` on a thread of its own, item after item in the order they were put.

    Leaving the ``with`` block waits until all of it is done; leaving it through an exception drops what has not been
    begun. What ``work`` raises is raised from the next :meth:`put`, or on leaving.

    Args:
        work: Called with each item.
        depth: Items that may wait: what bounds the memory. :meth:`put` waits while there are as many.
    """

    def __init__(self, work: Callable[[T], None], depth: int = 2) -> None:
        self._work = work
        self._items: queue.Queue[T | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._dropping = False
        self._done = 0
        self._thread = threading.Thread(target=self._run, name="kdfast-finish", daemon=True)

    @property
    def done(self) -> int:
        """Items that are finished."""
        return self._done

    def put(self, item: T) -> None:
        """Hand over an item.

        Raises:
            BaseException: What an earlier item raised; it is raised once, and nothing is done after it.
        """
        self._raise()
        self._items.put(item)
        self._raise()

    def __enter__(self) -> Background[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dropping = self._dropping or error is not None
        self._items.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if self._dropping:
                continue
            try:
                self._work(item)
                self._done += 1
            except BaseException as error:
                # From here on items are only taken off, so that the caller never waits for a thread that gave up.
                self._error, self._dropping = error, True
