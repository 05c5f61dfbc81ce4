"""The page of ``kdfast data-report``: a verdict, its reasons, and the pictures they were taken from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from kdfast.data.datasets import load_dataset
from kdfast.data.records import ImageRecords, LabelledRecords
from kdfast.experiments.common.held_out import splits_itself
from kdfast.experiments.common.teacher_view import Teacher, View, view
from kdfast.experiments.data_report import verdict as data_verdict
from kdfast.experiments.data_report.config import DataReportConfig
from kdfast.experiments.data_report.measure import Seen
from kdfast.report import data_plots
from kdfast.report.page import Card, Figure, Page, Section, Table

_COLUMNS, _SURE, _UNSURE = 10, 4, 3
_PAIRS = 10
_LARGEST = 64  # side of a picture on the page
_POINTS = 1500  # in a plane: more hide each other
_GRID = 160  # cells a side of the plane's regions

Images = NDArray[np.uint8]


def build(
    config: DataReportConfig,
    teacher: Teacher,
    students: Sequence[Teacher],
    images: ImageRecords,
    seen: Seen,
    metrics: Mapping[str, Any],
) -> Page:
    """Draw everything."""
    names = teacher.described.classes or tuple(map(str, range(teacher.num_classes)))
    sections = [
        Section("How even it is", _coverage(metrics, names), wide=True),
        Section("What it looks like to the teacher", (_pictures(seen.view, images, names),)),
        Section("How sure the teacher is", _confidence(seen.view, metrics)),
    ]
    if students or seen.view.features.shape[1] == 2:
        sections.append(
            Section("The plane of the features", _planes(config, teacher, students, seen.view, names))
        )
    elif seen.view.features.shape[1] > 2:
        sections.append(
            Section("Where it lies in the teacher's features", (_projected(seen.view, names),), wide=True)
        )
    if len(seen.pairs.post):
        sections.append(Section("At the boundaries", (_boundary(seen, teacher, names),)))
    if seen.groups:
        sections.append(Section("Copies", (_copies(seen, images),)))
    headline, advice = str(metrics["verdict"]), str(metrics["advice"])
    cards = (
        Card(f"{metrics['relative_entropy_raw']:.3f}", "relative entropy, as it is", main=True),
        Card(f"{metrics['relative_entropy_balanced']:.3f}", "after kdfast select"),
        Card(f"{metrics['classes_predicted']} of {metrics['classes']}", "classes predicted"),
        Card(f"{metrics['looked_at']:,}", _looked(metrics)),
    )
    shown = {
        key: value
        for key, value in metrics.items()
        if isinstance(value, (int, float, str)) and key not in ("verdict", "advice", "grade", "first_fault")
    }
    rows = tuple((key.replace("_", " "), _number(value)) for key, value in shown.items())
    return Page(
        f"{metrics['data']}, for {metrics['teacher']}",
        f"{headline}. {advice}",
        cards,
        tuple(data_verdict.findings(metrics)),
        tuple(sections),
        (Table("All numbers", rows),),
    )


def _looked(metrics: Mapping[str, Any]) -> str:
    whole = metrics["images"] - metrics["faults"] <= metrics["looked_at"]
    return "images, all looked at" if whole else f"of {metrics['images']:,} images looked at"


def _coverage(metrics: Mapping[str, Any], names: Sequence[str]) -> tuple[Figure, ...]:
    counts = dict(zip(names, metrics["class_counts"]))
    known = data_plots.among(
        data_verdict.PAPER_POINTS,
        {"this set": metrics["relative_entropy_raw"], "after select": metrics["relative_entropy_balanced"]},
        xlabel="relative entropy of the teacher's predictions",
        ylabel="student's accuracy / teacher's",
    )
    return (
        Figure(
            "Classes that the teacher predicts",
            "The dashed line is where every class would be if the set were even.",
            svg=data_plots.shares(counts, xlabel="predicted class"),
        ),
        Figure(
            "Among the sets of the paper",
            "Each point is a student of the paper's Table 1 (ResNet-18, six ResNet-50 teachers), over the "
            "relative "
            "entropy of its data in Table 3. Even data is needed, and not enough: what is in the images "
            "counts too. "
            "No promise for this set is made here.",
            svg=known,
        ),
    )


def _pictures(seen: View, images: ImageRecords, names: Sequence[str]) -> Figure:
    counts = np.bincount(seen.first)
    classes = np.argsort(-counts, kind="stable")[: min(_COLUMNS, np.count_nonzero(counts))]
    wanted: list[list[int | None]] = []
    for label in classes:
        rows = np.flatnonzero(seen.first == label)
        order = rows[np.argsort(-seen.confidence[rows], kind="stable")].tolist()
        sure = order[:_SURE]
        unsure = order[len(sure) :][-_UNSURE:]
        wanted.append([*sure, *[None] * (_SURE - len(sure)), *[None] * (_UNSURE - len(unsure)), *unsure])
    found = _load(images, seen, [row for column in wanted for row in column if row is not None])
    grid = [
        [None if (row := column[y]) is None else found[row] for column in wanted]
        for y in range(_SURE + _UNSURE)
    ]
    headings = [f"{_short(names, label)}\n{counts[label]:,}" for label in classes]
    more = np.count_nonzero(counts) - len(classes)
    return Figure(
        caption=f"A column for each predicted class, the most frequent first, with its number of images"
        f"{f' ({more} more are not shown)' if more > 0 else ''}. Above: the images that the teacher is "
        "surest of; below: "
        "those it is least sure of.",
        svg=data_plots.sheet(grid, columns=headings, names=[*["sure"] * _SURE, *["unsure"] * _UNSURE]),
    )


def _confidence(seen: View, metrics: Mapping[str, Any]) -> tuple[Figure, ...]:
    return (
        Figure(
            "Confidence",
            f"Softmax of the predicted class; {100 * metrics['unsure_share']:.0f} % lie below 0.9, the "
            "attack's threshold.",
            svg=data_plots.histogram(seen.confidence, xlabel="confidence", mark=0.9, note="0.9"),
        ),
        Figure(
            "Margin",
            "Distance from the predicted class to the runner-up: 0 is on a boundary.",
            svg=data_plots.histogram(seen.margin, xlabel="margin"),
        ),
    )


def _projected(seen: View, names: Sequence[str]) -> Figure:
    """The plane in which the features vary most."""
    rows = np.random.default_rng(0).permutation(len(seen.index))[:_POINTS]
    points = seen.features[rows].astype(np.float64)
    points = points - points.mean(0)
    _, scale, axes = np.linalg.svd(points, full_matrices=False)
    share = (scale[:2] ** 2 / max((scale**2).sum(), 1e-30)).round(2)
    return Figure(
        caption="The two directions in which the teacher's pooled features vary most; a colour for each predicted class"
        f"{'' if len(names) <= 10 else ' (repeated)'}.",
        svg=data_plots.plane(
            points @ axes[:2].T,
            seen.first[rows],
            names=names,
            xlabel=f"first direction, {100 * share[0]:.0f} % of the variance",
            ylabel=f"second direction, {100 * share[1]:.0f} %",
            wide=True,
        ),
    )


def _planes(
    config: DataReportConfig, teacher: Teacher, students: Sequence[Teacher], seen: View, names: Sequence[str]
) -> tuple[Figure, ...]:
    """Fig. 2: the data in the teacher's plane, test images in the students', each with its own boundaries."""
    figures = [_plane(teacher, seen, names, "Teacher", "this set, coloured by the teacher's class")]
    if config.test_data is None:
        return tuple(figures)
    for network in (teacher, *students):
        dataset = load_dataset(
            config.test_data,
            "test",
            whole=not splits_itself(config.data, config.test_data),
            image_size=network.described.image_size,
            label_column=config.label_column,
        )
        records = LabelledRecords(dataset, network.device)
        tested = view(network, records, batch_size=config.batch_size, features=True)
        labels = records.labels[tested.index]
        right = 100 * float((tested.first == labels).mean())
        who = "Teacher" if network is teacher else f"Student {network.name}"
        title = f"{who}: {right:.1f} % of {config.test_data}"
        figures.append(
            _plane(network, tested, names, title, "test images, coloured by their true class", labels)
        )
    return tuple(figures)


def _plane(
    network: Teacher,
    seen: View,
    names: Sequence[str],
    title: str,
    what: str,
    classes: NDArray[np.int64] | None = None,
) -> Figure:
    rows = np.random.default_rng(0).permutation(len(seen.index))[:_POINTS]
    points = seen.features[rows]
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    room = 0.12 * np.maximum(high - low, 1e-6)
    (left, bottom), (right, top) = (low - room).tolist(), (high + room).tolist()
    extent = (left, right, bottom, top)
    return Figure(
        title,
        f"Its two pooled features with its decision boundaries; {what}.",
        svg=data_plots.plane(
            points,
            (seen.first if classes is None else classes)[rows],
            names=names,
            xlabel="first feature",
            ylabel="second feature",
            regions=(_regions(network, extent), extent),
        ),
    )


@torch.no_grad()
def _regions(network: Teacher, extent: tuple[float, float, float, float]) -> NDArray[np.int64]:
    left, right, bottom, top = extent
    x, y = torch.linspace(left, right, _GRID), torch.linspace(bottom, top, _GRID)
    down, across = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([across, down], -1).view(-1, 2, 1, 1).to(network.device)
    # The head pools first; a map of one pixel is its own mean.
    head: Any = network.network
    classes: NDArray[np.int64] = head.forward_head(points).argmax(1).view(_GRID, _GRID).cpu().numpy()
    return classes


def _boundary(seen: Seen, teacher: Teacher, names: Sequence[str]) -> Figure:
    pairs, start = seen.pairs, seen.start[seen.pairs.success]
    shown = slice(0, _PAIRS)
    moved = (pairs.post[shown] - start[shown]) / (2 * 8 / 255) + 0.5
    with torch.no_grad():
        before, after = (teacher(part[shown]).argmax(1).tolist() for part in (pairs.pre, pairs.post))
    rows = [_bytes(start[shown]), _bytes(pairs.pre[shown]), _bytes(pairs.post[shown]), _bytes(moved)]
    return Figure(
        caption="Images, the pair that the attack found from each (either side of the boundary to the runner-up, "
        "within ε = 8/255), and the change to the second of them, grey for none. Above: the classes on the two sides.",
        svg=data_plots.sheet(
            rows,
            columns=[f"{_short(names, a)} → {_short(names, b)}" for a, b in zip(before, after)],
            names=["image", "before", "behind", "change"],
        ),
    )


def _copies(seen: Seen, images: ImageRecords) -> Figure:
    groups = seen.groups[:_COLUMNS]
    found = _load(images, seen.view, [int(row) for group in groups for row in (group[0], group[1])])
    return Figure(
        caption="Two images of each of the largest groups of copies, and how many there are of it.",
        svg=data_plots.sheet(
            [[found[int(group[row])] for group in groups] for row in (0, 1)],
            columns=[f"{len(group)} ×" for group in groups],
        ),
    )


def _load(images: ImageRecords, seen: View, rows: Sequence[int]) -> dict[int, Images]:
    """Pictures by row of the view."""
    numbers = np.unique(seen.index[list(rows)])
    found: dict[int, Images] = {}
    for index, batch in images.batches(numbers, 64):
        found |= dict(zip(index.tolist(), _bytes(batch)))
    return {row: found[int(seen.index[row])] for row in rows}


def _bytes(batch: torch.Tensor) -> list[Images]:
    if max(batch.shape[-2:]) > _LARGEST:
        batch = F.interpolate(batch, size=(_LARGEST, _LARGEST), mode="bilinear", antialias=True)
    return list((batch.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def _short(names: Sequence[str], label: int) -> str:
    name = names[label] if label < len(names) else str(label)
    return name if len(name) <= 9 else f"{name[:8]}…"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
