"""Bars on a terminal of 80 columns, one line that changes in a notebook, a line a minute in a log."""

from __future__ import annotations

import io
import re
import sys

import pytest

from kdfast.training import progress as module
from kdfast.training.progress import Progress, clock


class Clock:
    """A clock that tests move by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr(module, "time", moved)
    return moved


def test_a_log_has_a_line_a_minute(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        task = progress.task("train", total=3600, unit="step")
        for _ in range(600):
            time.now += 1
            task.advance(note="loss 1")
            progress.say("epoch", always=False)
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) <= 11
    assert lines[0] == "train 5/3600 · 1.0 step/s · 59:55 left · loss 1"


def test_a_line_that_must_be_said_is_said(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.say("first")
        progress.say("not now", always=False)
        progress.say("last")
    assert capsys.readouterr().err == "first\nlast\n"


class Stream(io.StringIO):
    """Standard error of a terminal, or of a notebook's cell."""

    terminal = True

    def isatty(self) -> bool:
        return self.terminal


def test_a_terminal_of_80_columns_is_not_overrun(time: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with Progress() as progress:
        task = progress.task("distill", total=150000, unit="step")
        time.now += 1000
        task.advance(12345, note="epoch 12/100 · loss 0.01234 · acc 85.1 %")
        progress.say("epoch 12/100 · accuracy 85.1 %")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert max(map(len, lines)) <= 80
    assert any(
        line.startswith("distill") and "left epoch 12/100 · loss 0.01234 · acc 85" in line for line in lines
    )
    assert "epoch 12/100 · accuracy 85.1 %" in [line.strip() for line in lines]


def test_a_notebook_has_one_line_that_changes(time: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    stream.terminal = False
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module, "in_notebook", lambda: True)
    with Progress() as progress:
        task = progress.task("train", total=100, unit="step")
        for _ in range(100):
            time.now += 0.1
            task.advance()
        progress.say("done")
    text = stream.getvalue()
    assert text.count("\n") == 2
    assert 15 <= text.count("\r") <= 25
    assert text.endswith("\ndone\n")


def test_nothing_is_shown_where_it_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(enabled=False) as progress:
        progress.task("count", total=1).advance()
        progress.say("line")
    assert capsys.readouterr().err == ""


def test_clock() -> None:
    assert [clock(seconds) for seconds in (5, 65.9, 3600, 7265)] == ["0:05", "1:05", "1:00:00", "2:01:05"]
