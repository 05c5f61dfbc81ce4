"""Plots and pages made from metrics files; nothing here runs a model.

Names are imported on first use, so that ``import kdfast.report`` needs no extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdfast.report.grid import write_grid
    from kdfast.report.page import write_report
    from kdfast.report.runs import Run, read_run

_HOME = {"grid": ("write_grid",), "page": ("write_report",), "runs": ("Run", "read_run")}

__all__ = ["Run", "read_run", "write_grid", "write_report"]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"kdfast.report.{module}"), name)
    raise AttributeError(f"module 'kdfast.report' has no attribute {name!r}")
