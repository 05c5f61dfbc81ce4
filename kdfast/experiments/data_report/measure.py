"""The numbers of a data report, and what they were taken from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.data.boundary import BoundaryPairs, decision_boundary_pairs
from kdfast.data.quality import class_spread, duplicate_groups, effective_directions, picture_hashes
from kdfast.data.records import LabelledRecords, ShardRecords
from kdfast.data.selection import relative_entropy
from kdfast.experiments.common.teacher_view import Teacher, View, augmented_entropy, view
from kdfast.experiments.data_report import verdict
from kdfast.experiments.data_report.config import DataReportConfig
from kdfast.training.progress import Progress


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


def measure(
    config: DataReportConfig, teacher: Teacher, images: ShardRecords | LabelledRecords, progress: Progress
) -> tuple[Seen, dict[str, Any]]:
    """Show the teacher the set, and a sample of it augmented and attacked.

    Returns:
        What the page draws, and what ``metrics.json`` holds but the seconds.

    Raises:
        DataError: None of the images can be decoded.
    """
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
    augmented, mixed = augmented_entropy(config, teacher, images, seen.index[sample], progress)
    task = progress.task("attack", total=len(attacked), unit="img")
    start, pairs = _attack(config, teacher, images, seen, attacked, task.advance)
    classes, width = teacher.num_classes, seen.features.shape[1]
    counts = np.bincount(seen.first, minlength=classes)
    distinct = _distinct(seen.first, keys, classes)
    thin = (counts > 0) & (distinct < verdict.THIN)
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
        "smallest_share": float(counts.min() / counts.sum()),
        "largest_class": _name(teacher, int(counts.argmax())),
        "smallest_class": _name(teacher, int(counts.argmin())),
        "relative_entropy_raw": relative_entropy(counts),
        "relative_entropy_balanced": verdict.reachable_entropy(predicted, classes),
        "relative_entropy_supported": verdict.reachable_entropy(predicted - int(thin.sum()), classes),
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
    grade, headline, advice = verdict.verdict(metrics)
    return Seen(seen, groups, start, pairs), {
        "verdict": headline,
        "grade": grade,
        "advice": advice,
        **metrics,
    }


def _name(teacher: Teacher, label: int) -> str:
    names = teacher.described.classes
    return str(names[label]) if label < len(names) else str(label)


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
