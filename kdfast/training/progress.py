"""Progress of long work: a bar on a terminal, one line that changes in a notebook, a line a minute in a log file."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

from kdfast.errors import require

#: Seconds between lines where there is no terminal; the first one comes soon, so that it says how long all will take.
_LINE_EVERY, _FIRST_AFTER = 60.0, 5.0
#: Seconds between changes of a notebook's line, and between lines that are said above a bar.
_NOTEBOOK_EVERY, _SAID_EVERY = 0.5, 1.0


def in_notebook() -> bool:
    """Whether standard error is a notebook's cell."""
    return type(sys.stderr).__module__.startswith("ipykernel")


def rich_escape(text: str) -> str:
    """What a bar is to show as it is, brackets and all."""
    escaped: str = require("rich.markup", extra="train", feature="the progress bar").escape(text)
    return escaped


class Task:
    """One bar; made by :meth:`Progress.task`."""

    def __init__(
        self, owner: Progress, description: str, total: int | None, unit: str, completed: int
    ) -> None:
        self._owner, self.description, self.total, self.unit = owner, description, total, unit
        self.completed = completed
        self._first, self._started = completed, time.monotonic()
        self._bar = owner._add(self)

    @property
    def rate(self) -> float:
        """Units a second since the task began."""
        return (self.completed - self._first) / max(time.monotonic() - self._started, 1e-9)

    @property
    def left(self) -> str:
        """Minutes and seconds left at this rate, as ``1:05``; empty where there is no telling."""
        if self.total is None or self.completed == self._first:
            return ""
        return clock((self.total - self.completed) / max(self.rate, 1e-9))

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
        self._notebook = enabled and in_notebook()
        self._began, self._spoke, self._said = time.monotonic(), 0.0, 0.0
        self._open = ""  # a notebook's line that is not ended yet

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            rich = require("rich.progress", extra="train", feature="the progress bar")
            table = require("rich.table", extra="train", feature="the progress bar")
            console = require("rich.console", extra="train", feature="the progress bar").Console(stderr=True)
            plain = {"table_column": table.Column(no_wrap=True)}
            # 80 columns hold all of it.
            self._rich = rich.Progress(
                rich.TextColumn("[bold]{task.description}", **plain),
                rich.BarColumn(bar_width=8),
                rich.TextColumn("{task.fields[count]}", **plain),
                rich.TextColumn("{task.fields[rate]}", **plain),
                rich.TextColumn("{task.fields[left]}", **plain),
                rich.TextColumn(
                    "{task.fields[note]}",
                    style="dim",
                    table_column=table.Column(no_wrap=True, overflow="ellipsis"),
                ),
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
        self._end_line()

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

    def say(self, line: str, *, always: bool = True) -> None:
        """Print a line above the bar; ``always`` false lets it go where others were said a moment before.

        A moment is a second on a terminal, and a minute in a log file.
        """
        now = time.monotonic()
        live = self._rich is not None or self._notebook
        due = now - self._said >= _SAID_EVERY if live else self._due(now)
        if not self.enabled or not (always or due):
            return
        self._said = self._spoke = now
        if self._rich is not None:
            self._rich.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            self._end_line()
            print(line, file=sys.stderr, flush=True)

    def _add(self, task: Task) -> Any:
        if self._rich is None:
            return None
        return self._rich.add_task(
            rich_escape(task.description),
            total=task.total,
            completed=task.completed,
            count="",
            rate="",
            left="",
            note="",
        )

    def _show(self, task: Task, note: str) -> None:
        if not self.enabled:
            return
        now, done = time.monotonic(), task.completed == task.total
        if self._rich is not None:
            left = "" if done or not task.left else f"{task.left} left"
            rate = f"{_short(task.rate)}/s"
            self._rich.update(
                task._bar, completed=task.completed, count=_count(task), rate=rate, left=left, note=note
            )
        elif self._notebook:
            if now - self._spoke >= _NOTEBOOK_EVERY or done:
                self._spoke, self._open = now, _line(task, note)
                print(f"\r{self._open}\033[K", end="", file=sys.stderr, flush=True)
        elif done or self._due(now):
            self._spoke = now
            print(_line(task, note), file=sys.stderr, flush=True)

    def _due(self, now: float) -> bool:
        return now - (self._spoke or self._began - _LINE_EVERY + _FIRST_AFTER) >= _LINE_EVERY

    def _end_line(self) -> None:
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = ""


def clock(seconds: float) -> str:
    """Seconds as ``1:05``, or ``2:01:05`` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _count(task: Task) -> str:
    """How many of how many; where those are long numbers, how much of it."""
    if task.total is None:
        return str(task.completed)
    if task.total < 1000:
        return f"{task.completed}/{task.total}"
    return f"{100 * task.completed / task.total:.0f} %"


def _short(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def _line(task: Task, note: str) -> str:
    parts = [f"{task.description} {task.completed}"]
    if task.total is not None:
        parts = [f"{task.description} {task.completed}/{task.total}"]
        if task.completed < task.total and task.left:
            parts.append(f"{task.left} left")
    parts.insert(1, f"{_short(task.rate)} {task.unit}/s")
    return " · ".join([*parts, note] if note else parts)
