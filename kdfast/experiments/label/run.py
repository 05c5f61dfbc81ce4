"""``kdfast label``: a teacher's outputs for a set of images, stored for students to learn from."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.data.manifest import is_shard_folder
from kdfast.data.records import ImageRecords
from kdfast.errors import ConfigError, DataError
from kdfast.experiments.common.opening import parameters_of
from kdfast.experiments.common.results import writing
from kdfast.experiments.common.stored_labels import HEADER, TENSORS, Views, as_tensors, write_labels
from kdfast.experiments.common.teacher_view import Teacher, open_images
from kdfast.experiments.label.config import LabelConfig
from kdfast.training.accelerator import make_accelerator
from kdfast.training.progress import Progress


def run(config: LabelConfig) -> dict[str, Any]:
    """Show the teacher every image, and store what it says.

    Returns:
        ``images``, ``views``, ``bytes`` on disk, ``seconds``, ``images_per_second`` (views counted), and ``out``.

    Raises:
        ConfigError: A value makes no sense for this data or teacher, or ``out`` holds labels already.
        DataError: The images cannot be used, or the teacher's outputs are not finite.
        CheckpointError: The teacher cannot be read, or the disk is full.
    """
    if config.out is None and not is_shard_folder(config.data):
        raise ConfigError(
            f"--out: missing; labels of {config.data}, which are no shards, need a directory of their own"
        )
    with writing(config.out or config.data) as out:
        return _run(config, out)


def _run(config: LabelConfig, out: Path) -> dict[str, Any]:
    started = time.monotonic()
    if (out / HEADER).exists():
        raise ConfigError(
            f"--out: {out} holds labels already, accepted: another directory (or remove {HEADER} and {TENSORS} there)"
        )
    device = make_accelerator(config.device).device
    teacher = Teacher.load(config.teacher, device, config, image_size=config.image_size)
    if config.top_k is not None and config.top_k > teacher.num_classes:
        raise ConfigError(
            f"top_k: got {config.top_k}, accepted: 1 to the teacher's {teacher.num_classes} classes, or null for all"
        )
    size = config.image_size or teacher.described.image_size
    images = open_images(config, image_size=size, device=device)
    with closing(images), Progress(enabled=config.progress) as progress:
        views = Views(config.views, config.augment, config.seed)
        count = len(images.labels)
        task = progress.task("label", total=count * config.views, unit="img")
        logits = _outputs(config, teacher, images, views, task)
    header = {
        "data": config.data,
        "images": count,
        "contents": images.contents(),
        "teacher": config.teacher,
        "teacher_fingerprint": teacher.fingerprint(),
        "teacher_parameters": parameters_of(teacher.network),
        "network": asdict(teacher.described),
        "image_size": size,
        "views": config.views,
        "augment": list(config.augment),
        "seed": config.seed,
        "top_k": config.top_k,
        "temperature": config.temperature,
    }
    written = write_labels(out, header, as_tensors(logits, config.top_k, config.temperature))
    seconds = time.monotonic() - started
    return {
        "images": count,
        "views": config.views,
        "bytes": written,
        "seconds": round(seconds, 3),
        "images_per_second": round(count * config.views / max(seconds, 1e-9), 1),
        "out": str(out),
    }


@torch.no_grad()
def _outputs(config: LabelConfig, teacher: Teacher, images: ImageRecords, views: Views, task: Any) -> Tensor:
    """Logits float16 ``[N, V, C]``; rows of images that could not be decoded are NaN, and students never see them."""
    count = len(images.labels)
    found = torch.full((count, config.views, teacher.num_classes), float("nan"), dtype=torch.float16)
    draws = [views.draws(count, view) for view in range(config.views)]
    for rows, batch in images.batches(np.arange(count), config.batch_size):
        index = torch.from_numpy(rows)
        for view, drawn in enumerate(draws):
            logits = teacher(views.apply(batch, drawn, index)).float()
            if (
                not bool(logits.isfinite().all())
                or float(logits.abs().max()) > torch.finfo(torch.float16).max
            ):
                raise DataError(
                    f"teacher {config.teacher}: its outputs for {config.data} are not finite numbers within float16's "
                    "range, so they cannot be stored"
                )
            found[index, view] = logits.half().cpu()
            task.advance(len(rows))
    return found
