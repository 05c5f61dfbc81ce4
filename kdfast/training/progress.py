"""Progress of long work: a bar with rate and time left on a terminal, now and then a line in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from kdfast.errors import require

_LINE_EVERY = 15.0  # seconds between lines where there is no terminal


class Task:
    """One bar; made by :meth:`Progress.task`."""

    def __init__(
        self, owner: Progress, description: str, total: int | None, unit: str, completed: int
    ) -> None:
        self._owner, self.description, self.total, self.unit = owner, description, total, unit
        self.completed = completed
        self._first, self._started, self._printed = completed, time.monotonic(), time.monotonic()
        self._bar = owner._add(self)

    @property
    def rate(self) -> float:
        """Units a second since the task began."""
        return (self.completed - self._first) / max(time.monotonic() - self._started, 1e-9)

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count ``amount`` more units as done; ``note`` stands at the end of the line."""
        self.completed += amount
        self._owner._show(self, note)


class Progress:
    """Context manager around long work.

    Writes to standard error, so that a command's result on standard output stays clean.

    Args:
        enabled: ``False`` shows nothing (tests, ranks other than 0).

    Example:
        >>> with Progress(enabled=False) as progress:
        ...     task = progress.task("decode", total=3, unit="img")
        ...     for _ in range(3):
        ...         task.advance()
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._rich: Any = None

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            rich = require("rich.progress", extra="train", feature="the progress bar")
            console = require("rich.console", extra="train", feature="the progress bar").Console(stderr=True)
            self._rich = rich.Progress(
                rich.TextColumn("[bold]{task.description}"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TextColumn("{task.fields[rate]}"),
                rich.TimeElapsedColumn(),
                rich.TextColumn("left"),
                rich.TimeRemainingColumn(),
                rich.TextColumn("{task.fields[note]}", style="dim"),
                console=console,
                transient=False,
            )
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def task(
        self, description: str, total: int | None = None, *, unit: str = "it", completed: int = 0
    ) -> Task:
        """Begin a bar.

        Args:
            description: What is being done.
            total: Units in all; ``None`` if unknown.
            unit: Name of a unit, for the rate.
            completed: Units already done by an earlier run (they do not count in the rate).
        """
        return Task(self, description, total, unit, completed)

    def _add(self, task: Task) -> Any:
        if self._rich is None:
            return None
        markup = require("rich.markup", extra="train", feature="the progress bar")
        return self._rich.add_task(
            markup.escape(task.description), total=task.total, completed=task.completed, rate="", note=""
        )

    def _show(self, task: Task, note: str) -> None:
        if self._rich is not None:
            self._rich.update(
                task._bar, completed=task.completed, rate=f"{task.rate:.1f} {task.unit}/s", note=note
            )
        elif self.enabled and (
            time.monotonic() - task._printed >= _LINE_EVERY or task.completed == task.total
        ):
            task._printed = time.monotonic()
            print(_line(task, note), file=sys.stderr, flush=True)


def _line(task: Task, note: str) -> str:
    parts = [f"{task.description} {task.completed}"]
    if task.total is not None:
        left = (task.total - task.completed) / max(task.rate, 1e-9)
        parts = [f"{task.description} {task.completed}/{task.total}"]
        if task.completed < task.total:
            parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
    parts.insert(1, f"{task.rate:.1f} {task.unit}/s")
    return " · ".join([*parts, note] if note else parts)
