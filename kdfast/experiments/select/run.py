"""``kdfast select``: from many images those that cover a teacher's classes evenly, as a set of shards."""

from __future__ import annotations

import io
import json
import time
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.data import ShardWriter, relative_entropy, select_balanced, select_long_tail
from kdfast.data.codec import decode, extension
from kdfast.data.records import LabelledRecords, ShardRecords
from kdfast.disk import write_atomic
from kdfast.documents import read_regular
from kdfast.errors import ConfigError, DataError
from kdfast.experiments.common.results import METRICS, writing
from kdfast.experiments.common.teacher_view import Teacher, augmented_entropy, open_images, view
from kdfast.experiments.select.config import SelectConfig
from kdfast.training import files
from kdfast.training.accelerator import make_accelerator
from kdfast.training.progress import Progress

INDEX = "indices.txt"
PREDICTIONS = "predictions.npz"
IN_DOMAIN, OUT_OF_DOMAIN = "in-domain", "out-of-domain"

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class _Work:
    config: SelectConfig
    teacher: Teacher
    images: ShardRecords | LabelledRecords
    index: Rows
    predicted: Rows
    progress: Progress


def run(config: SelectConfig) -> dict[str, Any]:
    """Select, and write the new set.

    The label of a written image is the teacher's class for it (Eq. 1), so that ``attack_targets: stored`` can use it;
    beside it stand the number it had in ``data`` and its old label.

    Returns:
        What ``metrics.json`` holds: ``images``, ``of`` how many, ``classes_predicted`` at all, the relative entropies
        ``relative_entropy_raw``, ``…_selected``, ``…_augmented`` and ``…_mixup``, ``replicated`` (how many of the
        images are there already) and ``seconds``; of two subsets each with its own.

    Raises:
        ConfigError: A value makes no sense for this data or teacher.
        DataError: The images cannot be used, or the teacher puts all of them into one class.
        CheckpointError: The teacher cannot be read.
        ShardError: ``out`` holds another set.
    """
    with writing(config.out) as out:
        return _run(config, out)


def _run(config: SelectConfig, out: Path) -> dict[str, Any]:
    started = time.monotonic()
    if not config.resume and (out / METRICS).exists():
        raise ConfigError(
            f"--out: {out} holds a selection already; go on with --resume, or choose another directory"
        )
    device = make_accelerator(config.device).device
    teacher = Teacher.load(config.teacher, device, config, image_size=config.image_size)
    image_size = config.image_size or teacher.described.image_size
    images = open_images(config, image_size=image_size, device=device)
    with closing(images), Progress(enabled=config.progress) as progress:
        parts = _parts(config, images)
        index, predicted = _predictions(config, teacher, images, progress)
        work = _Work(config, teacher, images, index, predicted, progress)
        results = {name: _select(work, name, rows) for name, rows in parts.items()}
    flat = {
        f"{name.replace('-', '_')}_{key}" if name else key: value
        for name, result in results.items()
        for key, value in result.items()
    }
    metrics = {**flat, "seconds": round(time.monotonic() - started, 3)}
    files.write_json(out / METRICS, metrics)
    return metrics


def _parts(config: SelectConfig, images: ShardRecords | LabelledRecords) -> dict[str, Rows]:
    """The images to select from, by subset; one without a name unless ``shared`` asks for two."""
    everything = np.arange(len(images.labels))
    if config.shared is None:
        return {"": everything}
    inside = np.isin(images.labels, _shared_classes(config.shared, images))
    parts = {IN_DOMAIN: everything[inside], OUT_OF_DOMAIN: everything[~inside]}
    for name, rows in parts.items():
        if not len(rows):
            raise ConfigError(
                f"shared: {config.shared} leaves the {name} subset of {config.data} without an image"
            )
    return parts


def _shared_classes(path: str, images: ShardRecords | LabelledRecords) -> list[int]:
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"shared: {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise ConfigError(f"shared: {path} names no class, accepted: class names or numbers, one a line")
    known = {name: number for number, name in enumerate(images.classes)}
    highest = max(len(images.classes) - 1, int(images.labels.max()))
    found = []
    for name in names:
        if name in known:
            found.append(known[name])
        elif name.isdecimal() and int(name) <= highest:
            found.append(int(name))
        else:
            some = f"names such as {', '.join(images.classes[:3])}, or " if images.classes else ""
            raise ConfigError(
                f"shared: {path}: no class {name!r}, accepted: {some}numbers from 0 to {highest}"
            )
    return found


def _predictions(
    config: SelectConfig, teacher: Teacher, images: ShardRecords | LabelledRecords, progress: Progress
) -> tuple[Rows, Rows]:
    """Numbers and classes of all usable images; from the file that an earlier run left, if it is about the same."""
    path = Path(config.out) / PREDICTIONS
    identity = f"{images.fingerprint} {teacher.fingerprint()} {config.image_size}"
    if (kept := _kept(path, identity, len(images.labels), teacher.num_classes)) is not None:
        return kept
    task = progress.task("predict", total=len(images.labels), unit="img")
    seen = view(teacher, images, batch_size=config.batch_size, advance=task.advance)
    with files.reporting_disk(path):
        stored = io.BytesIO()
        np.savez(stored, index=seen.index, predicted=seen.first, identity=identity)
        write_atomic(path, stored.getbuffer())
    return seen.index, seen.first


def _kept(path: Path, identity: str, images: int, classes: int) -> tuple[Rows, Rows] | None:
    """What an earlier run left; ``None`` if there is nothing, or something else, or only half of it."""
    try:
        data = read_regular(path, limit=32 * images + (1 << 16))
        with np.load(io.BytesIO(data)) as kept:
            index, predicted = kept["index"], kept["predicted"]
            if str(kept["identity"]) != identity:
                return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError):
        return None
    for column, limit in ((index, images), (predicted, classes)):
        if column.dtype != np.int64 or column.ndim != 1 or len(column) != len(index):
            return None
        if len(column) and not (column.min() >= 0 and column.max() < limit):
            return None
    return index, predicted


def _select(work: _Work, name: str, rows: Rows) -> dict[str, Any]:
    config, teacher = work.config, work.teacher
    usable = np.isin(work.index, rows)
    index, predicted = work.index[usable], work.predicted[usable]
    raw = np.bincount(predicted, minlength=teacher.num_classes)
    what = f"{config.data}{f' ({name})' if name else ''}"
    if np.count_nonzero(raw) == 1 and teacher.num_classes > 1:
        raise DataError(
            f"{what}: the teacher puts all {len(index):,} images into class {predicted[0]}, so there is nothing to "
            "balance. Is this the teacher's kind of image, and its normalisation? kdfast data-report shows what it sees"
        )
    budget = min(config.budget, len(index))
    if config.budget < np.count_nonzero(raw):
        raise ConfigError(
            f"budget: got {config.budget}, accepted for {what}: at least {np.count_nonzero(raw)}, one image for each "
            "class that the teacher predicts"
        )
    if isinstance(work.images, LabelledRecords) and len(index) <= config.budget and not config.long_tail:
        picked = np.arange(len(index))  # as the paper leaves real sets of up to 50K
    elif config.long_tail is None:
        picked = select_balanced(predicted, budget, teacher.num_classes, seed=config.seed).numpy()
    else:
        picked = select_long_tail(
            predicted, budget, teacher.num_classes, ratio=config.long_tail, seed=config.seed
        ).numpy()
    chosen, labels = index[picked], predicted[picked]
    sample = np.random.default_rng(config.seed).permutation(chosen)[: config.entropy_images]
    augmented, mixed = augmented_entropy(config, teacher, work.images, sample, work.progress)
    result = {
        "images": len(chosen),
        "of": len(index),
        "classes_predicted": int(np.count_nonzero(raw)),
        "relative_entropy_raw": relative_entropy(raw),
        "relative_entropy_selected": relative_entropy(np.bincount(labels, minlength=teacher.num_classes)),
        "relative_entropy_augmented": augmented,
        "relative_entropy_mixup": mixed,
        "replicated": len(chosen) - len(np.unique(chosen)),
    }
    folder = Path(config.out) / name
    if config.index_only:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_file(folder / INDEX, "".join(f"{number}\n" for number in chosen))
    else:
        _write(work, folder, chosen, labels, result)
    return result


def _write(work: _Work, folder: Path, chosen: Rows, labels: Rows, facts: Mapping[str, Any]) -> None:
    config, images = work.config, work.images
    # Files stay as they are.
    kind = extension(images.stored(chosen[:1].tolist())[0]) if isinstance(images, ShardRecords) else "jpg"
    metadata = {
        "generator": "selection",
        "data": Path(config.data).name,
        "data_fingerprint": images.fingerprint,
        "teacher": work.teacher.name,
        "teacher_fingerprint": work.teacher.fingerprint(),
        "budget": config.budget,
        "long_tail": config.long_tail,
        "regime": config.regime,
        "seed": config.seed,
        "classes": list(work.teacher.described.classes),
        **facts,
    }
    with ShardWriter(
        folder,
        samples_per_shard=config.samples_per_shard,
        image_format=kind,  # type: ignore[arg-type]
        quality=config.quality,
        num_classes=work.teacher.num_classes,
        resume=config.resume,
        metadata=json.loads(json.dumps(metadata)),
    ) as writer:
        task = work.progress.task("write", len(chosen), unit="img", completed=writer.num_samples)
        for start in range(writer.num_samples, len(chosen), config.batch_size):
            rows = slice(start, start + config.batch_size)
            extra = [{"source": int(i), "label": int(images.labels[i])} for i in chosen[rows]]
            stored = images.stored(chosen[rows].tolist())
            writer.write(_one_format(stored, kind), labels[rows], extra)
            task.advance(len(extra))


def _one_format(stored: list[bytes] | torch.Tensor, kind: str) -> Any:
    """Files as they are; where a set mixes formats, those of the other one are encoded anew."""
    if isinstance(stored, torch.Tensor) or all(extension(file) == kind for file in stored):
        return stored
    from kdfast.data.codec import encoder

    encode = encoder(kind, 95)
    return [file if extension(file) == kind else encode(decode(file)) for file in stored]
