"""The recipes that come with kdfast, a cell at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from kdfast.experiments.common.tables import Table, tables


@dataclass(frozen=True)
class Cell:
    """A cell, by the name that its file had when each had one (of newer cells: the table's and its own)."""

    table: Table
    name: str
    stem: str

    @property
    def values(self) -> dict[str, Any]:
        return self.table.resolve(self.name)


def cells(method: str) -> list[Cell]:
    return [Cell(table, name, _stem(table, name)) for table in tables(method) for name in table.cells]


def parameters(chosen: list[Cell], quick: set[str] | None = None) -> list[Any]:
    """For ``parametrize``: those that are not quick are slow."""
    slow = [pytest.mark.slow] if quick is not None else []
    return [pytest.param(c, id=c.stem, marks=[] if c.stem in (quick or ()) else slow) for c in chosen]


def _stem(table: Table, name: str) -> str:
    before = table.document.get("formerly")
    if isinstance(before, str):
        return before + name
    short = table.name.rpartition("/")[2]
    return next((old for old, cell in (before or {}).items() if cell == name), f"{short}-{name}")
