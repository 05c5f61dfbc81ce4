"""Ctrl-C that waits for the end of a step, so that the run can write a checkpoint first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

#: Ctrl-C, a batch system's end, a closed terminal, and the warnings that Slurm is told to send (``--signal=USR1@120``).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class TrainingInterrupted(KeyboardInterrupt):
    """A run stopped by Ctrl-C or another of :data:`SIGNALS`, after writing a checkpoint.

    Attributes:
        checkpoint: What to go on from; ``None`` if the run keeps none.
        signal: The signal's number.
    """

    def __init__(self, checkpoint: Path | None, number: int) -> None:
        super().__init__(f"interrupted; checkpoint: {checkpoint}")
        self.checkpoint, self.signal = checkpoint, number


class Interrupt:
    """Whether the user has asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Remember the signals of :data:`SIGNALS` instead of dying of them; a second one takes effect at once.

    One that is ignored stays ignored: a run in the background of a script, say, is not for Ctrl-C to stop.
    """
    flag = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # only the main thread may set handlers
        return

    def remember(number: int, frame: FrameType | None) -> None:
        if flag.signal is not None:
            raise KeyboardInterrupt
        flag.signal = number

    # Nor is a handler taken over that Python did not set (None): it could not be put back.
    heard = [n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, remember) for number in heard}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
