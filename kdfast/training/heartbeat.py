"""Ranks that hear of each other: a rank that stops, dies or is cut off ends the others, and says so.

A collective waits for a lost rank for half an hour (gloo) or ten minutes (NCCL), in silence. So each rank counts aloud
in a key-value store by a thread of its own, and listens to the others. A rank that is slow goes on counting; one that
is stopped, swapped out, dead or off the network does not.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch

from kdfast.training.accelerator import gather_objects

__all__ = ["INTERVAL", "LIMIT", "LOST", "Listener", "hearing"]

#: Seconds between two counts, and after which a rank that was not heard of is lost.
INTERVAL, LIMIT = 3.0, 45.0
#: Exit code of a rank that ended because another was lost (EX_TEMPFAIL: run it again).
LOST = 75


@contextlib.contextmanager
def hearing(accelerator: Any) -> Iterator[None]:
    """Listen to the other ranks inside the block; nothing where there are none, or where they cannot meet.

    All ranks enter it, and all leave it together, but for those that fail.
    """
    store = _meet(accelerator) if accelerator.num_processes > 1 else None
    if store is None:
        yield
        return
    listener = Listener(store, accelerator.process_index, accelerator.num_processes)
    listener.start()
    try:
        yield
        # Nobody falls silent while another still trains.
        accelerator.wait_for_everyone()
    except RuntimeError:
        # Whoever missed a lost rank first has ended already, and what fails here is the collective with that one.
        rank = listener.lost(LIMIT / 2)
        if rank is not None:
            traceback.print_exc()
            listener.lose(rank)
        raise
    finally:
        listener.end()
    # Rank 0 holds the store: it goes when nobody asks it any more.
    accelerator.wait_for_everyone()


def _meet(accelerator: Any) -> Any:
    """A store in rank 0 that all are connected to; ``None``, for all of them, where one is not."""
    host, rank, store, port = os.environ.get("MASTER_ADDR"), accelerator.process_index, None, 0
    if host is None or not torch.distributed.is_initialized():
        return None
    connect = torch.distributed.TCPStore  # type: ignore[attr-defined]
    wait = timedelta(seconds=LIMIT)
    with contextlib.suppress(RuntimeError):  # torch's DistError is one
        if rank == 0:
            store = connect(host, 0, None, True, wait, wait_for_workers=False)
            port = store.port
    port = gather_objects(port)[0]
    with contextlib.suppress(RuntimeError):
        if rank and port:
            store = connect(host, port, None, False, wait)
    missing = [other for other, met in enumerate(gather_objects(store is not None)) if not met]
    if not missing:
        return store
    if rank == 0:
        print(
            f"kdfast: rank {missing[0]} cannot reach a port of {host}'s choice: a rank that is lost will only be "
            "noticed by torch.distributed's own timeout",
            file=sys.stderr,
        )
    return None


class Listener(threading.Thread):
    """Counts for this rank in ``store``, and looks whether the others do.

    Args:
        store: One of ``torch.distributed``'s stores, shared by all ranks.
        rank: This process.
        ranks: How many there are.
        lose: What to do when one is lost, given its number; ends the process by default.
    """

    def __init__(self, store: Any, rank: int, ranks: int, lose: Callable[[int], None] | None = None) -> None:
        super().__init__(name="kdfast-heartbeat", daemon=True)
        self._store, self._rank, self._ranks = store, rank, ranks
        self.lose = lose or self._end_process
        self._ended = threading.Event()
        #: When each of the others was last heard of.
        self.heard = dict.fromkeys((other for other in range(ranks) if other != rank), time.monotonic())
        self._answered = time.monotonic()  # the store, which is in rank 0
        # It has a thread of its own: a store whose process is stopped does not answer, and does not refuse either.
        self._talk = threading.Thread(target=self._exchange, name="kdfast-heartbeat-store", daemon=True)

    def start(self) -> None:
        """Begin to count and to listen."""
        self._talk.start()
        super().start()

    def end(self) -> None:
        """Do neither any longer.

        Both threads are waited for: one that Python's end finds inside the store would abort the process.
        """
        self._ended.set()
        self._talk.join(LIMIT)
        self.join(LIMIT)

    def run(self) -> None:
        """Look until :meth:`end` whether anybody is missing."""
        before = time.monotonic()
        while not self._ended.wait(INTERVAL):
            now = time.monotonic()
            if now - before > LIMIT / 2:  # this process was stopped itself, and perhaps all of them were
                self.heard, self._answered = dict.fromkeys(self.heard, now), now
            before = now
            rank = self.lost(LIMIT)
            if rank is not None:
                self.lose(rank)
                return

    def lost(self, limit: float) -> int | None:
        """Which rank was not heard of for ``limit`` seconds; rank 0 where its store does not answer either."""
        now = time.monotonic()
        silent = [rank for rank, last in self.heard.items() if now - last > limit]
        if not silent:
            return None
        return 0 if self._rank and now - self._answered > limit / 2 else silent[0]

    def _exchange(self) -> None:
        count, said = 0, dict.fromkeys(self.heard, 0)
        # The store's error: rank 0 is gone, or has failed and ended; the watch says so if this rank goes on.
        with contextlib.suppress(RuntimeError):
            while not self._ended.wait(INTERVAL):
                count += 1
                self._store.set(str(self._rank), str(count))
                for rank, before in said.items():
                    said[rank] = int(self._store.get(str(rank))) if self._store.check([str(rank)]) else 0
                    if said[rank] != before:
                        self.heard[rank] = time.monotonic()
                self._answered = time.monotonic()

    def _end_process(self, rank: int) -> None:
        """End at once: the main thread waits inside a collective, where no exception reaches it."""
        silence = time.monotonic() - self.heard[rank]
        print(
            f"kdfast: rank {rank} of {self._ranks} was not heard of for {silence:.0f} s (stopped, dead, or off the "
            f"network): rank {self._rank} ends; --resume goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)
