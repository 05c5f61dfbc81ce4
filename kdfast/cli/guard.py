"""What a command does with an error: one clear line and the right exit code."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import ParamSpec

import typer

from kdfast.errors import ConfigError, KDFastError

P = ParamSpec("P")

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Options:
    """Global options, set before a command runs."""

    debug = False


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors into exit codes: a line on standard error, and the traceback only with ``--debug``."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with stoppable():
                command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output has gone: nothing to tell anyone
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(_interrupted(interrupt)) from None
        except Exception as error:
            if Options.debug:
                traceback.print_exc()
            say(_describe(error))
            raise typer.Exit(USAGE if isinstance(error, ConfigError) else FAILED) from None

    return run


class Stopped(KeyboardInterrupt):
    """A command that has no checkpoint to write was told to stop, by a signal other than Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.signal = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """End on a closed terminal's or a batch system's signal as on Ctrl-C: locks dropped, files whole, a line said."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    wanted = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {n: signal.signal(n, stop) for n in wanted if signal.getsignal(n) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str) -> None:
    """Print a line for the user, beside the command's result."""
    typer.echo(f"kdfast: {line}", err=True)


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, KDFastError):
        return text
    if isinstance(error, (ValueError, TypeError)):
        return text or type(error).__name__
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    checkpoint = getattr(interrupt, "checkpoint", None)
    if checkpoint is None:
        say(
            "interrupted; what was finished is kept, and --resume goes on from there where the command has it"
        )
    else:
        say(f"interrupted; the checkpoint {checkpoint} is written, go on with --resume")
    number = getattr(interrupt, "signal", signal.SIGINT)
    return INTERRUPTED if number == signal.SIGINT else 128 + int(number)
