"""``kdfast report``: a page from the metrics of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdfast.disk import Lock
from kdfast.errors import ConfigError, DataError
from kdfast.report.page import write_report

LOCK = ".report.lock"


def run(runs: Sequence[str | Path], out: str | Path | None = None) -> list[Path]:
    """Make one page of these runs.

    Args:
        runs: Their directories.
        out: Where the page and its figures go; by default a single run's own directory, and ``report`` for several:
            what is said of several belongs to none of them.

    Returns:
        The page and the figures that were written beside it.

    Raises:
        DataError: A run has no metrics.
        ConfigError: Another process is writing the page; the message names it.
    """
    if not runs:
        raise DataError("report: got no runs, accepted: at least one run's directory")
    folder = Path(out) if out is not None else Path("report") if len(runs) > 1 else Path(runs[0])
    if folder == Path(runs[0]) and not folder.is_dir():
        raise DataError(f"{folder}: does not exist, or is no directory")
    folder.mkdir(parents=True, exist_ok=True)
    # Not the run's own lock: a run that is still writing can be reported on.
    with Lock(folder / LOCK, what=str(folder), error=ConfigError, who="another report"):
        page = write_report(runs, folder / "report.html")
    return [page, *sorted((page.parent / "plots").glob("*.svg"))]
