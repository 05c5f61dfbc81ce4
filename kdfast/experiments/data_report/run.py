"""``kdfast data-report``: what makes a set good or bad for a teacher, before anyone trains on it."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types as at
import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.data.boundary import BoundaryPairs, decision_boundary_pairs
from kdfast.data.quality import class_spread, duplicate_groups, effective_directions, picture_hashes
from kdfast.data.records import LabelledRecords, ShardRecords
from kdfast.data.selection import relative_entropy
from kdfast.errors import ConfigError
from kdfast.experiments.common.results import METRICS, Count
from kdfast.experiments.common.teacher_view import Teacher, View, augmented_entropy, open_images, view
from kdfast.experiments.data_report import page as data_page
from kdfast.experiments.data_report import verdict as data_verdict
from kdfast.report.page import render_pages
from kdfast.training import files
from kdfast.training.accelerator import make_accelerator
from kdfast.training.progress import Progress

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class DataReportConfig:
    """Which set, which teacher, how closely to look.

    Attributes:
        data: A directory of shards, or real images: ``digits``, a folder, ``hf:NAME``.
        teacher: Directory of a trained network.
        out: Directory for ``report.html``, ``metrics.json`` and ``plots/``.
        limit: Look at no more than this many images, drawn at random.
        sample: How many of them serve for features, augmentation and duplicates' pictures.
        attacked: How many for the boundaries: each costs 22 passes of the teacher.
        regime: Augmentation whose effect is measured.
        students: Directories of students with two pooled features (``gap2``), to be drawn beside such a teacher
            (Fig. 2).
        test_data: What students are drawn with: ``digits``, a folder, ``hf:NAME``.
        split: Of labelled images: ``train``, ``test`` or ``all``.
        label_column: For ``hf:`` data with several class columns, which one to use.
        seed: Of the draws.
        batch_size: Images the teacher sees at a time.
        device: ``auto`` takes the GPU if there is one.
        loader: For shards: ``dali``, or ``torch`` for the plain loader.
        on_error: ``skip`` damaged images and report them, or ``raise``.
        progress: Show a progress bar.
    """

    data: str
    teacher: str
    out: str
    limit: Count = 20_000
    sample: Count = 2000
    attacked: Count = 256
    regime: Literal["none", "standard", "high", "extreme"] = "high"
    students: tuple[str, ...] = ()
    test_data: str | None = None
    split: Literal["train", "test", "all"] = "train"
    label_column: str | None = None
    seed: Annotated[int, at.Ge(0)] = 0
    batch_size: Count = 256
    device: Literal["auto", "cpu", "cuda"] = "auto"
    loader: Literal["dali", "torch"] = "dali"
    on_error: Literal["raise", "skip"] = "skip"
    progress: bool = True

    def __post_init__(self) -> None:
        if self.students and self.test_data is None:
            raise ConfigError(
                "test_data: missing; students are drawn with the images that they are tested on"
            )


@dataclass(frozen=True)
class Seen:
    """Everything that the page draws.

    Attributes:
        view: The teacher's predictions and features.
        groups: Rows of ``view`` that are copies of each other.
        start: Images that were attacked, ``[N, 3, H, W]`` in [0, 1].
        pairs: What the attack found of them.
    """

    view: View
    groups: list[NDArray[np.int64]]
    start: torch.Tensor
    pairs: BoundaryPairs


def run(config: DataReportConfig) -> dict[str, Any]:
    """Look at the set, and write the page.

    Returns:
        The main numbers of ``metrics.json``: ``verdict`` in words, ``grade``, relative entropies, shares, and where the
        page is.

    Raises:
        DataError: The images cannot be used.
        CheckpointError: The teacher, or a student, cannot be read.
        ConfigError: Students are to be drawn that cannot be.
    """
    started = time.monotonic()
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: got {out}, which is a file, accepted: a directory")
    device = make_accelerator(config.device).device
    teacher = Teacher.load(config.teacher, device)
    students = [Teacher.load(path, device) for path in config.students]
    for network in (teacher, *students) if students else ():
        if getattr(network.network, "num_features", None) != 2:
            raise ConfigError(
                f"students: {network.name} has no two pooled features to draw, accepted: networks like "
                "gap2, and such a "
                "teacher"
            )
    images = open_images(
        config.data,
        image_size=teacher.described.image_size,
        device=device,
        split=config.split,
        label_column=config.label_column,
        loader=config.loader,
        on_error=config.on_error,
    )
    with closing(images), Progress(enabled=config.progress) as progress:
        seen, metrics = _measure(config, teacher, images, progress)
        metrics["seconds"] = round(time.monotonic() - started, 3)
        page = data_page.build(config, teacher, students, images, seen, metrics)
        with files.reporting_disk(out):
            out.mkdir(parents=True, exist_ok=True)
        target = render_pages(
            [page],
            out / PAGE,
            title=page.name,
            sources=[Path(config.data).name, f"{teacher.name}/model.safetensors"],
        )
    files.write_json(out / METRICS, metrics)
    shown = {key: value for key, value in metrics.items() if not isinstance(value, (dict, list))}
    return {**shown, "report": str(target)}


def _measure(
    config: DataReportConfig, teacher: Teacher, images: ShardRecords | LabelledRecords, progress: Progress
) -> tuple[Seen, dict[str, Any]]:
    rng = np.random.default_rng(config.seed)
    count = len(images.labels)
    # In the set's order, so that shards are read from front to back.
    rows = np.arange(count) if count <= config.limit else np.sort(rng.permutation(count)[: config.limit])
    keys: list[bytes] = []
    task = progress.task("look", total=len(rows), unit="img")
    seen = view(
        teacher,
        images,
        rows,
        batch_size=config.batch_size,
        features=True,
        each=lambda batch: keys.extend(picture_hashes(batch)),
        advance=task.advance,
    )
    groups = duplicate_groups(keys)
    picked = rng.permutation(len(seen.index))
    sample, attacked = np.sort(picked[: config.sample]), np.sort(picked[: config.attacked])
    task = progress.task("augment", total=len(sample), unit="img")
    augmented, mixed = augmented_entropy(
        teacher,
        images,
        seen.index[sample],
        regime_name=config.regime,
        seed=config.seed,
        batch_size=config.batch_size,
        advance=task.advance,
    )
    task = progress.task("attack", total=len(attacked), unit="img")
    start, pairs = _attack(config, teacher, images, seen, attacked, task.advance)
    classes, width = teacher.num_classes, seen.features.shape[1]
    counts = np.bincount(seen.first, minlength=classes)
    distinct = _distinct(seen.first, keys, classes)
    thin = (counts > 0) & (distinct < data_verdict.THIN)
    predicted = int(np.count_nonzero(counts))
    spread = class_spread(seen.features[sample], seen.first[sample])
    faults = images.faults if isinstance(images, ShardRecords) else []
    metrics: dict[str, Any] = {
        "data": Path(config.data).name,
        "teacher": teacher.name,
        "images": count,
        "looked_at": len(seen.index),
        "classes": classes,
        "classes_predicted": predicted,
        "thin_classes": int(thin.sum()),
        "largest_share": float(counts.max() / counts.sum()),
        "relative_entropy_raw": relative_entropy(counts),
        "relative_entropy_balanced": data_verdict.reachable_entropy(predicted, classes),
        "relative_entropy_supported": data_verdict.reachable_entropy(predicted - int(thin.sum()), classes),
        "relative_entropy_sample": relative_entropy(np.bincount(seen.first[sample], minlength=classes)),
        "relative_entropy_augmented": augmented,
        "relative_entropy_mixup": mixed,
        "regime": config.regime,
        "confidence_mean": float(seen.confidence.mean()),
        "margin_median": float(np.median(seen.margin)),
        "unsure_share": float((seen.confidence < 0.9).mean()),
        "boundary_reachable": float(pairs.success.float().mean()),
        "feature_dimensions": width,
        "effective_directions": effective_directions(seen.features[sample]),
        "class_spread": spread if np.isfinite(spread) else None,
        "duplicate_share": sum(len(group) - 1 for group in groups) / len(keys),
        "largest_duplicate_group": len(groups[0]) if groups else 1,
        "faults": len(faults),
        "first_fault": str(faults[0]) if faults else "",
        "class_counts": counts.tolist(),
    }
    grade, headline, advice = data_verdict.verdict(metrics)
    return Seen(seen, groups, start, pairs), {
        "verdict": headline,
        "grade": grade,
        "advice": advice,
        **metrics,
    }


def _distinct(predicted: NDArray[np.int64], keys: list[bytes], classes: int) -> NDArray[np.int64]:
    """Different images of each predicted class."""
    pairs = set(zip(predicted.tolist(), keys))
    return np.bincount([label for label, _ in pairs], minlength=classes)


def _attack(
    config: DataReportConfig,
    teacher: Teacher,
    images: ShardRecords | LabelledRecords,
    seen: View,
    rows: NDArray[np.int64],
    advance: Any,
) -> tuple[torch.Tensor, BoundaryPairs]:
    """From each image towards its runner-up: the boundary that is nearest in the teacher's eyes."""
    targets = dict(zip(seen.index.tolist(), seen.second.tolist()))
    starts, found = [], []
    for numbers, batch in images.batches(seen.index[rows], config.batch_size):
        target = torch.tensor([targets[int(i)] for i in numbers], device=teacher.device)
        found.append(decision_boundary_pairs(teacher, batch, target))
        starts.append(batch)
        advance(len(numbers))
    parts = [torch.cat(list(column)) for column in zip(*found)]
    return torch.cat(starts), BoundaryPairs(*parts)
