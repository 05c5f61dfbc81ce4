"""The page of ``kdfast reproduce``: the paper's value, ours, the difference, and what differed in protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.experiments.common.tables import Table
from kdfast.report.page import Finding, Page, Section, render_pages
from kdfast.report.page import Table as Rows

PAGE = "report.html"
_NAMES = {"accuracy": "top-1, %", "top5_accuracy": "top-5, %", "miou": "mIoU"}


@dataclass(frozen=True)
class Row:
    """One cell.

    Attributes:
        cell: Its name.
        paper: What the paper reports, by metric; accuracies in per cent.
        ours: By metric, the mean over seeds and its standard deviation, in the same units; empty if not finished.
        seeds: The seeds.
        seconds: Of a student's training, on average.
        comparable: Whether the paper's value is of the same experiment, which a miniature's is not.
        trained: Of a miniature, which networks stand for the cell's.
    """

    cell: str
    paper: Mapping[str, float]
    ours: Mapping[str, tuple[float, float]]
    seeds: tuple[int, ...] = ()
    seconds: float | None = None
    comparable: bool = True
    trained: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; ``difference`` is ours less the paper's."""
        ours = {name: round(mean, 4) for name, (mean, _) in self.ours.items()}
        return {
            "paper": dict(self.paper),
            "ours": ours,
            "std": {name: round(std, 4) for name, (_, std) in self.ours.items()},
            "difference": {
                k: round(v - self.paper[k], 4) for k, v in ours.items() if self.comparable and k in self.paper
            },
            "seeds": list(self.seeds),
            "seconds": self.seconds,
        }


def write_page(
    table: Table,
    rows: Sequence[Row],
    out: Path,
    *,
    small: bool,
    seeds: int,
    differs: Sequence[str],
    teachers: Mapping[str, float | None],
) -> Path:
    """Write ``report.html`` and return where it is.

    Args:
        table: What was reproduced.
        rows: Its cells.
        out: Where the page goes.
        small: A miniature, said first and in large.
        seeds: Students a cell.
        differs: What is not as in the paper.
        teachers: Their accuracies by place.
    """
    metrics = [m for m in _NAMES if any(m in row.paper or m in row.ours for row in rows)]
    metrics = [m for m in metrics if m == table.metric or any(m in row.paper for row in rows)]
    finished = sum(bool(row.ours) for row in rows)
    each = "one seed" if seeds == 1 else f"{seeds} seeds"
    lead = f"{table.source}: {table.title}. {finished} of {len(rows)} cells are finished, {each} each."
    head = ["cell", "trained"] if small else ["cell"]
    for metric in metrics:
        # A miniature's difference from the paper would be read as one.
        head += [f"paper, {_NAMES[metric]}", "ours", *(() if small else ("difference",))]
    body = tuple(
        (
            row.cell,
            *((row.trained,) if small else ()),
            *(word for metric in metrics for word in _words(row, metric)[: 2 if small else 3]),
            _seeds(row),
            _time(row),
        )
        for row in rows
    )
    findings = [Finding("note", "What differs from the paper", text) for text in differs]
    if small:
        findings[0] = Finding("note", "This is a miniature, not the paper's experiment", differs[0])
    tables = [Rows("Cells", body, (*head, "seeds", "time"), numbers=True)]
    if teachers:
        known = tuple(
            (k, f"{v:.2f} mIoU" if table.metric == "miou" else f"{100 * v:.2f} %")
            for k, v in teachers.items()
            if v is not None
        )
        tables.append(Rows("Teachers", known, ("teacher", table.metric), numbers=True))
    if table.ours:
        tables.append(Rows("What the paper does not give, and is ours", tuple(table.ours.items())))
    if table.notes:
        tables.append(Rows("Notes", tuple((str(n), note) for n, note in enumerate(table.notes, 1))))
    title = f"{table.name}, in miniature" if small else table.name
    page = Page(
        title, lead, findings=tuple(findings), sections=_pictures(rows, metrics), tables=tuple(tables)
    )
    return render_pages(
        [page], out / PAGE, title=title, sources=[f"cells/{row.cell}" for row in rows if row.ours]
    )


def _pictures(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[Section, ...]:
    from kdfast.report import plots
    from kdfast.report.page import Figure

    values = {row.cell: row.ours[metrics[0]][0] / 100 for row in rows if metrics and metrics[0] in row.ours}
    if len(values) < 2 or metrics[0] == "miou":
        return ()
    return (Section("Ours", (Figure(svg=plots.bars(values, xlabel="top-1 accuracy")),), wide=True),)


def _words(row: Row, metric: str) -> tuple[str, str, str]:
    digits = 3 if metric == "miou" else 2
    paper = row.paper.get(metric)
    said = "–" if paper is None else f"{paper:.{digits}f}"
    if metric not in row.ours:
        return said, "–", "–"
    mean, std = row.ours[metric]
    spread = f" ± {std:.{digits}f}" if len(row.seeds) > 1 else ""
    return said, f"{mean:.{digits}f}{spread}", "–" if paper is None else f"{mean - paper:+.{digits}f}"


def _seeds(row: Row) -> str:
    return ", ".join(map(str, row.seeds)) or "–"


def _time(row: Row) -> str:
    if row.seconds is None:
        return "–"
    return f"{row.seconds:.0f} s" if row.seconds < 3600 else f"{row.seconds / 3600:.2f} h"
