"""Which cells ``kdfast reproduce`` runs, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdfast.experiments.common.bounds import Count


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """What to reproduce.

    Attributes:
        table: A table's name, such as ``dmkd/table-2``, or its file.
        out: Directory for teachers, images, students and the page.
        cells: Which cells; empty for all.
        scale: ``full`` as the paper has it, or ``small``: the same table on a small set, in minutes on a CPU.
        seeds: Students of each cell, each with its own seed.
        dry_run: Say what would be run, and what is missing; run nothing.
        overrides: Values that go before the recipes', in every cell.
        progress: Show what is going on.
    """

    table: str
    out: str
    cells: tuple[str, ...] = ()
    scale: Literal["full", "small"] = "full"
    seeds: Count = 1
    dry_run: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = True
