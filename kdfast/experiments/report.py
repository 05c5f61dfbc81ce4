"""``kdfast report``: a page from the metrics of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdfast.report.page import write_report


def run(runs: Sequence[str | Path]) -> list[Path]:
    """Make one page of these runs, in the first one's directory.

    Returns:
        The page and the figures that were written beside it.

    Raises:
        DataError: A run has no metrics.
    """
    page = write_report(runs)
    return [page, *sorted((page.parent / "plots").glob("*.svg"))]
