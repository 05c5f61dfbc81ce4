"""What a run says before it trains (data, networks, steps) and when it is done (who learned how much, where it is)."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdfast.data.datasets import LabelledImages
from kdfast.data.folders import ImageFolder
from kdfast.data.hub import HuggingFaceImages
from kdfast.data.labelled import pillow
from kdfast.data.loader import ShardLoader
from kdfast.data.segmentation import SegmentationFolder
from kdfast.experiments.common.image_batches import ImageBatches
from kdfast.experiments.common.training_recipe import TrainingRecipe
from kdfast.training.model_io import BEST, WEIGHTS
from kdfast.training.progress import Progress, clock
from kdfast.training.telling import SCORES, percent, score_of

_LOOKED_AT = 24  # images whose headers say how large a set's images are
_LABEL = 10  # columns of a line's first word


class Speaker:
    """Lines for a person on standard error, labelled in a column of their own; silent where progress is off."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._progress = Progress(enabled)

    def say(self, label: str, *parts: str) -> None:
        """One line: a label, and its parts divided by commas; empty ones are left out."""
        self._progress.say(f"{label:<{_LABEL}}{', '.join(part for part in parts if part)}".rstrip())


def say_data(speaker: Speaker, label: str, data: Any, network_size: int) -> None:
    """Images, classes, their smallest and largest number of images, sizes, and what the networks see of them.

    Args:
        speaker: Who says it.
        label: The line's first word.
        data: A labelled data set, batches of one, a loader of shards, or a method's own batches.
        network_size: Side of the images that the networks see.
    """
    if not speaker.enabled or data is None:
        return
    if isinstance(data, ShardLoader):
        classes = "" if data.num_classes is None else f"{data.num_classes} classes"
        speaker.say(label, data.source, f"{data.num_samples:,} images in shards", classes)
        _say_sides(speaker, data.sides, network_size)
        return
    dataset = data.dataset if isinstance(data, ImageBatches) else data
    if not isinstance(dataset, (LabelledImages, SegmentationFolder)):
        speaker.say(label, "the method makes its own")
        return
    spread = ""
    if isinstance(dataset, LabelledImages):
        counts = dataset.labels.bincount(minlength=dataset.num_classes)
        low, high = int(counts.min()), int(counts.max())
        spread = f" of {low}" if low == high else f" of {low} to {high}"
    images = f"{len(dataset):,} images"
    speaker.say(label, str(dataset.source), images, f"{dataset.num_classes} classes{spread}")
    if label != "test" and (sides := original_sides(dataset)) is not None:
        _say_sides(speaker, sides, network_size)
    if dataset.note:
        speaker.say("", dataset.note)


def _say_sides(speaker: Speaker, sides: tuple[int, int], wanted: int) -> None:
    low, high = sides
    if sides == (wanted, wanted):
        return
    stored = f"{low}" if low == high else f"{low} to {high}"
    change = "shrunk" if low > wanted else "enlarged" if high < wanted else "resized"
    keeps = f"; image_size={low} keeps them larger" if low > wanted else ""
    speaker.say("", f"sides of {stored} pixels {change} to {wanted}×{wanted}{keeps}")


def original_sides(dataset: Any) -> tuple[int, int] | None:
    """The smallest and largest shorter side of some of a set's images as they are stored, of their headers alone."""
    image = pillow("reading images' headers")
    chosen = torch.linspace(0, len(dataset) - 1, min(_LOOKED_AT, len(dataset))).long().tolist()
    sides = []
    for index in chosen:
        source: Any = None
        if isinstance(dataset, ImageFolder):
            source = dataset.paths[index]
        elif isinstance(dataset, SegmentationFolder):
            source = dataset.pairs[index][0]
        elif isinstance(dataset, HuggingFaceImages):
            stored = dataset.table[index][dataset.image_column] or {}
            source = io.BytesIO(stored["bytes"]) if stored.get("bytes") else stored.get("path")
        if source is None:
            return None
        try:
            with image.open(source) as opened:
                sides.append(min(opened.size))
        except Exception:  # whoever trains on it will hear what is wrong with it
            return None
    return min(sides), max(sides)


def parameters_of(network: nn.Module) -> int:
    """How many numbers the network's parameters hold."""
    return sum(parameter.numel() for parameter in network.parameters())


def millions(count: int) -> str:
    """A count of parameters for a person: ``0.27 M``."""
    return f"{count / 1e6:.3g} M" if count >= 1e4 else f"{count:,}"


def say_training(speaker: Speaker, config: TrainingRecipe, steps: tuple[int, int], accelerator: Any) -> None:
    """Epochs, steps, batch, optimiser, rate and its schedule, device: defaults included, since they may surprise."""
    per_epoch, total = steps
    length = (
        f"{total:,} steps"
        if config.iterations
        else f"{config.epochs} epochs × {per_epoch:,} = {total:,} steps"
    )
    ranks = accelerator.num_processes
    shared = f" ({config.share(ranks)} on each of {ranks} processes)" if ranks > 1 else ""
    batch = f"batch {config.batch_size}{shared}"
    rate = f"lr {config.lr:g} {config.schedule}"
    speaker.say("training", length, batch, config.optimizer, rate, str(accelerator.device), config.precision)
    speaker.say("", "change any as KEY=VALUE at the end of the line; `kdfast keys` explains them")


def say_closing(
    speaker: Speaker,
    folder: Path,
    metrics: Mapping[str, Any],
    *,
    student: tuple[str, int],
    teacher: tuple[str, int] | None = None,
) -> None:
    """The table at the end.

    Args:
        speaker: Who says it.
        folder: The result directory.
        metrics: What ``metrics.json`` holds.
        student: Name and parameters of what was trained.
        teacher: The same of its teacher, if there was one.
    """
    name = score_of(metrics)
    score = "" if name is None else f"{SCORES[name]} {percent(metrics[name])}"
    size = f"{millions(student[1])} parameters"
    rows: list[tuple[str, ...]] = [("student" if teacher else "network", student[0], size, score)]
    if teacher is not None:
        known = metrics.get(f"teacher_{name}")
        if "share_kept" in metrics:
            score += f", {percent(metrics['share_kept'])} of the teacher's"
        fewer = teacher[1] / max(student[1], 1)
        size = f"{millions(student[1])} ({fewer:.3g}× fewer)" if fewer >= 1.05 else size
        of_teacher = "" if known is None or name is None else f"{SCORES[name]} {percent(known)}"
        rows = [
            ("teacher", teacher[0], f"{millions(teacher[1])} parameters", of_teacher),
            ("student", student[0], size, score),
        ]
    widths = [max(len(row[column]) for row in rows) for column in (1, 2)]
    for label, network, parameters, measured in rows:
        speaker.say(label, f"{network:<{widths[0]}}  {parameters:<{widths[1]}}  {measured}".rstrip())
    speaker.say("weights", f"{folder / WEIGHTS}  (last epoch)")
    if name is not None and (folder / BEST).exists():
        best, epoch = metrics.get(f"best_{name}"), metrics.get("best_epoch")
        if best is not None and epoch is not None:
            speaker.say("", f"{folder / BEST}  (best: {percent(best)} after epoch {epoch:.0f})")
    speaker.say("time", f"{clock(metrics['seconds'])} for {metrics['steps']:,} steps")
    # A format that torch alone writes: what stands here works as it stands.
    speaker.say("next", f"kdfast export {shlex.quote(str(folder))} --to torch.export")


def say_checked(speaker: Speaker, loss: float, *checked: str) -> None:
    """What a dry run did."""
    for number, line in enumerate((*checked, f"one optimiser step on a real batch: loss {loss:.4g}")):
        speaker.say("" if number else "checked", line)
    speaker.say("", "nothing was written")
