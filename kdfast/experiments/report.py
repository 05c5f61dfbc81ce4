"""``kdfast report``: a page from the metrics of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdfast.report.page import write_report


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
    """
    folder = Path(out) if out is not None else Path("report") if len(runs) > 1 else None
    page = write_report(runs, None if folder is None else folder / "report.html")
    return [page, *sorted((page.parent / "plots").glob("*.svg"))]
