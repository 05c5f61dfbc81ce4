"""``report.html``: one file with its figures and style inside, which opens from disk and fetches nothing."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdfast.documents import shown
from kdfast.errors import DataError, KDFastError, require
from kdfast.report import compare, denoising, inversion, plots, reverse
from kdfast.report.runs import METRICS, Run, read_run
from kdfast.report.studies import studies
from kdfast.version import __version__

_DEMO_KEYS = ("teacher_accuracy", "student_accuracy", "student_hard_label_accuracy", "student_noise_accuracy")
_DEMO_NAMES = (
    "teacher, on real images",
    "student, on synthetic images with soft labels",
    "student, on synthetic images with hard labels",
    "student, on noise with soft labels",
)
# Where a demo keeps each of them, in the same order.
_DEMO_RUNS = {
    "teacher": "teacher",
    "student-soft": "soft labels",
    "student-hard": "hard labels",
    "student-noise": "noise",
}


@dataclass(frozen=True)
class Figure:
    """A picture with words: either ``svg`` or ``png`` (base64)."""

    title: str = ""
    caption: str = ""
    svg: str = ""
    png: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, and figures: side by side, or each as wide as the page."""

    title: str
    figures: tuple[Figure, ...]
    wide: bool = False


@dataclass(frozen=True)
class Card:
    """One number, large."""

    value: str
    label: str
    main: bool = False


@dataclass(frozen=True)
class Finding:
    """One judgement: ``grade`` is ``good``, ``fair``, ``poor`` or ``note``; ``why`` says where its bounds come from."""

    grade: str
    title: str
    text: str
    why: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text; ``numbers`` aligns all but the first column to the right."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    head: tuple[str, ...] = ()
    numbers: bool = False


#: What a reader of one run asks first, and what is enough in the table below.
_CARDS = (
    "accuracy",
    "miou",
    "teacher_accuracy",
    "share_kept",
    "best_accuracy",
    "top5_accuracy",
    "parameters",
    "seconds",
)
_NO_CARDS = ("seed", "best_epoch", "steps", "images")


@dataclass(frozen=True)
class Page:
    """What the report says about one run."""

    name: str
    lead: str = ""
    cards: tuple[Card, ...] = ()
    findings: tuple[Finding, ...] = ()
    sections: tuple[Section, ...] = ()
    tables: tuple[Table, ...] = field(default=())


def write_report(
    paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None, *, title: str = ""
) -> Path:
    """Make a page from the metrics files of one or more runs.

    The plots are also written as SVG files into ``plots/`` beside the page.

    Args:
        paths: Directories of runs, as ``kdfast teach``, ``distill``, ``synth`` and ``demo`` leave them.
        output: The page; ``None`` for ``report.html`` in the first run's directory.
        title: Heading; ``None`` names the runs.

    Returns:
        The page's path.

    Raises:
        DataError: No runs, or one without metrics.
    """
    if not paths:
        raise DataError("report: got no runs, accepted: at least one run's directory")
    runs = [read_run(os.fspath(path)) for path in paths]
    pages = _pages(runs)
    target = Path(output) if output is not None else runs[0].path / "report.html"
    return render_pages(
        pages, target, title=title or _title(runs), sources=[f"{run.name}/{METRICS}" for run in runs]
    )


def _pages(runs: Sequence[Run]) -> list[Page]:
    """One a run, and one that compares them.

    Raises:
        DataError: A metric is of another type than runs write; somebody edited the file.
    """
    made, what = [], ""
    try:
        for run in runs:
            what = str(run.path)
            made.append(_demo_page(run) if _is_demo(run) else _run_page(run))
        what = ", ".join(str(run.path) for run in runs)
        return [_comparison(runs), *made] if len(runs) > 1 else made
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        if isinstance(error, KDFastError):
            raise
        raise DataError(
            f"{what}: {METRICS} or its log holds what no run writes: {shown(str(error))}"
        ) from error


def render_pages(pages: Sequence[Page], target: Path, *, title: str, sources: Sequence[str]) -> Path:
    """Write pages as one file, and their plots as SVG files into ``plots/`` beside it.

    Args:
        pages: One below the other.
        target: The file.
        title: Heading.
        sources: What the page was made from, for its last line.
    """
    jinja2 = require("jinja2", extra="report", feature="the report page")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    )
    html = environment.get_template("report.html.j2").render(
        title=title, pages=pages, sources=sources, version=__version__
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    _save_plots(target.parent / "plots", pages)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, target)
    return target


def _is_demo(run: Run) -> bool:
    return all(key in run.metrics for key in _DEMO_KEYS)


def _title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return "A student that never saw a real image" if _is_demo(runs[0]) else runs[0].name
    return f"{len(runs)} runs"


def _demo_page(run: Run) -> Page:
    metrics = run.metrics
    accuracy = dict(zip(_DEMO_NAMES, (float(metrics[key]) for key in _DEMO_KEYS)))
    _, soft, hard, noise = accuracy.values()
    lead = (
        f"A teacher learned from real digits. A diffusion model made {int(metrics['images']):,} synthetic ones, and "
        f"the student learned from those and the teacher's soft labels alone. On held-out real digits it reaches "
        f"{_percent(soft)}; on the same images with hard labels {_percent(hard)}, from noise {_percent(noise)}."
    )
    cards = tuple(
        Card(_percent(value), name, main=key == "student_accuracy")
        for key, (name, value) in zip(_DEMO_KEYS, accuracy.items())
    )
    sections = [
        Section(
            "Accuracy on held-out real images", (Figure(svg=plots.bars(accuracy, xlabel="top-1 accuracy")),)
        )
    ]
    if pictures := _pictures(run):
        sections.append(Section("What they saw", pictures))
    if learning := _demo_curves(run):
        sections.append(Section("How they learned", learning))
    return Page(run.name, lead, cards, sections=tuple(sections), tables=tuple(_tables(run, skip=_DEMO_KEYS)))


def _demo_curves(run: Run) -> tuple[Figure, ...]:
    """Accuracies in the bars' order, hence their colours; the diffusion model's loss, which compares with nothing."""
    children = {child.name: child for child in run.children}
    networks = {label: children[name] for name, label in _DEMO_RUNS.items() if name in children}
    figures = [figure for figure in _curve_figures(networks) if figure.title == "Accuracy"]
    if "diffusion" in children and (loss := children["diffusion"].series("train", "loss"))[0]:
        svg = plots.curves({"loss": loss}, xlabel="step", ylabel="loss", log=min(loss[1]) > 0, first_color=4)
        figures.append(Figure("Diffusion model: training loss", svg=svg))
    return tuple(figures)


def _run_page(run: Run) -> Page:
    numbers = {
        k: v for k, v in run.metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    named = [key for key in _CARDS if key in numbers]
    named += [key for key in numbers if key not in (*named, *_NO_CARDS)]
    cards = tuple(Card(_number(key, numbers[key]), _words(key)) for key in named[:8])
    sections = []
    runs = {run.name: run} if run.log else {child.name: child for child in run.children}
    if figures := tuple(_curve_figures(runs)):
        sections.append(Section("Curves", figures))
    sections += _inversion_sections({run.name: run})
    for title, traces in inversion.trace_figures(run).items():
        sections.append(Section(title, tuple(_figures(traces))))
    if parts := reverse.part_figures(run) or denoising.part_figures(run):
        sections.append(Section("Loss", tuple(_figures(parts))))
    if pictures := _pictures(run):
        sections.append(Section("Samples", pictures))
    tables = _tables(run, skip=inversion.DRAWN)
    if told := compare.told(run):
        tables.append(Table("Recipe", told))
    return Page(run.name, cards=cards, sections=tuple(sections), tables=tuple(tables))


def _inversion_sections(runs: Mapping[str, Run]) -> list[Section]:
    """What only some methods leave, for those runs that have it."""
    drawn = {
        "What the buffer holds": inversion.buffer_figures(runs),
        "Scale": inversion.scale_figures(runs),
        "Parameters": reverse.parameter_figure(runs),
        "Evaluations": denoising.evaluation_figure(runs),
        "Classes": inversion.class_accuracy_figure(runs),
        "Time": inversion.phase_figure(runs),
    }
    return [Section(title, tuple(_figures(found))) for title, found in drawn.items() if found]


def _figures(drawings: Sequence[inversion.Drawing]) -> list[Figure]:
    return [Figure(drawing.title, drawing.caption, svg=drawing.svg) for drawing in drawings]


def _comparison(runs: Sequence[Run]) -> Page:
    names = _unique_names(runs)
    drawn, grids = studies(runs)
    sections = [Section("Across runs", tuple(Figure(p.title, svg=p.svg) for p in drawn))] if drawn else []
    # More lines than colours tell nobody anything.
    figures = tuple(_curve_figures(dict(zip(names, runs)))) if len(runs) <= len(plots.PALETTE) else ()
    sections += [Section("Curves", figures)] if figures else []
    sections += _inversion_sections(dict(zip(names, runs)))
    head, rows = compare.results(runs, names)
    tables = [Table("Results", rows, head, numbers=True)]
    tables += [
        Table(grid.title, grid.rows, grid.head, numbers=True) for grid in (*grids, *compare.pivots(runs))
    ]
    head, rows = compare.facts(runs, names)
    tables += [Table("Recipes", rows, head)] if rows else []
    return Page("Comparison", sections=tuple(sections), tables=tuple(tables))


def _curve_figures(runs: Mapping[str, Run]) -> list[Figure]:
    """Accuracy over epochs, loss and the attack's success over steps, for the runs that logged them."""
    figures = []
    accuracy = {name: run.series("eval", "accuracy", against="epoch") for name, run in runs.items()}
    if accuracy := {name: curve for name, curve in accuracy.items() if curve[0]}:
        svg = plots.curves(accuracy, xlabel="epoch", ylabel="top-1 accuracy", percent=True)
        figures.append(Figure("Accuracy", svg=svg))
    losses = {name: run.series("train", "loss") for name, run in runs.items()}
    if losses := {name: curve for name, curve in losses.items() if curve[0]}:
        positive = all(y > 0 for _, ys in losses.values() for y in ys)
        figures.append(
            Figure("Training loss", svg=plots.curves(losses, xlabel="step", ylabel="loss", log=positive))
        )
    found = {name: run.series("train", "attack_success") for name, run in runs.items()}
    if found := {name: curve for name, curve in found.items() if curve[0]}:
        svg = plots.curves(found, xlabel="step", ylabel="images with a pair", percent=True)
        figures.append(Figure("Attack: images that a pair at the boundary was found for", svg=svg))
    return figures


def _pictures(run: Run) -> tuple[Figure, ...]:
    captions = run.metrics.get("captions", {})
    return tuple(
        Figure(caption=str(captions.get(path.name, "")), png=base64.b64encode(path.read_bytes()).decode())
        for path in run.pictures
    )


def _tables(run: Run, skip: Sequence[str] = ()) -> list[Table]:
    plain = {k: v for k, v in run.metrics.items() if k not in skip and k != "captions"}
    tables = [
        Table(_words(key).capitalize(), tuple((_words(str(k)), _number(str(k), v)) for k, v in value.items()))
        for key, value in plain.items()
        if isinstance(value, Mapping)
    ]
    rest = tuple((_words(k), _number(k, v)) for k, v in plain.items() if not isinstance(v, Mapping))
    return [Table("Numbers", rest), *tables] if rest else tables


def _save_plots(folder: Path, pages: Sequence[Page]) -> None:
    figures = [
        (section.title, f) for page in pages for section in page.sections for f in section.figures if f.svg
    ]
    if figures:
        folder.mkdir(exist_ok=True)
    for stale in folder.glob("[0-9][0-9]-*.svg"):
        stale.unlink()
    for number, (title, figure) in enumerate(figures, 1):
        slug = "-".join(re.findall(r"\w+", (figure.title or title).lower()))
        plots.save_svg(folder / f"{number:02d}-{slug}.svg", figure.svg)


def _unique_names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs)]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _number(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float) and ("accuracy" in key or key == "share_kept"):
        return _percent(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ", ".join(_number(key, entry) for entry in value) if isinstance(value, list) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
