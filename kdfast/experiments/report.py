"""``kdfast report``: a page from the metrics of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdfast.disk import Lock
from kdfast.errors import ConfigError, DataError
from kdfast.report.page import write_report

LOCK = ".report.lock"


def run(runs: Sequence[str | Path]) -> list[Path]:
    """Make one page of these runs, in the first one's directory.

    Returns:
        The page and the figures that were written beside it.

    Raises:
        DataError: A run has no metrics.
        ConfigError: Another process is writing the page; the message names it.
    """
    if not runs:
        raise DataError("report: got no runs, accepted: at least one run's directory")
    folder = Path(runs[0])
    if not folder.is_dir():
        raise DataError(f"{folder}: does not exist, or is no directory")
    # Not the run's own lock: a run that is still writing can be reported on.
    with Lock(folder / LOCK, what=str(folder), error=ConfigError, who="another report"):
        page = write_report(runs)
    return [page, *sorted((page.parent / "plots").glob("*.svg"))]
