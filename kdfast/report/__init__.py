"""Plots and pages made from metrics files; nothing here runs a model.

Names are imported on first use, so that ``import kdfast.report`` needs no extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdfast.lazy import attributes

if TYPE_CHECKING:
    from kdfast.report.grid import write_grid
    from kdfast.report.page import write_report
    from kdfast.report.runs import Run, read_run

_HOME = {"grid": ("write_grid",), "page": ("write_report",), "runs": ("Run", "read_run")}

__all__ = ["Run", "read_run", "write_grid", "write_report"]


__getattr__ = attributes(__name__, {name: module for module, names in _HOME.items() for name in names})
