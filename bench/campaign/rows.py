"""A pytest plugin that appends each test's outcome to the journal when it is known; passed ones are not run again.

python -m pytest -p bench.campaign.rows --rows=FILE
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kdfast.benchmarks.journal import Journal

#: Characters of a failure that a row keeps: the end says what was compared.
TAIL = 1500


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, required=True, help="the campaign's results.jsonl")


def pytest_configure(config: pytest.Config) -> None:
    journal = Journal(config.getoption("--rows"))
    config.pluginmanager.register(Rows(journal, worker=hasattr(config, "workerinput")), "campaign-rows")


class Rows:
    """Writes in the process that hears of all tests; leaves out in each that collects them."""

    def __init__(self, journal: Journal, *, worker: bool) -> None:
        self.journal, self.worker = journal, worker

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        # Nobody runs a test before all have collected, so that all workers read the same rows.
        passed = {
            r["id"] for r in self.journal.records() if r.get("kind") == "test" and r["outcome"] == "passed"
        }
        left = [item for item in items if item.nodeid in passed]
        items[:] = [item for item in items if item.nodeid not in passed]
        if left:
            config.hook.pytest_deselected(items=left)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.worker or (report.when != "call" and report.passed):
            return
        row = {"kind": "test", "part": "tests", "id": report.nodeid, "outcome": report.outcome}
        row["seconds"] = round(report.duration, 3)  # type: ignore[assignment]
        if not report.passed:
            row["text"] = str(report.longrepr)[-TAIL:]
        self.journal.append(row)
