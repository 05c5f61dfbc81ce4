"""``kdfast data-report``: what makes a set good or bad for a teacher, before anyone trains on it."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

from kdfast.errors import ConfigError
from kdfast.experiments.common.results import METRICS, writing
from kdfast.experiments.common.teacher_view import Teacher, open_images
from kdfast.experiments.data_report import page as data_page
from kdfast.experiments.data_report.config import DataReportConfig
from kdfast.experiments.data_report.measure import measure
from kdfast.report.page import render_pages
from kdfast.training import files
from kdfast.training.accelerator import make_accelerator
from kdfast.training.progress import Progress

PAGE = "report.html"


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
    with writing(config.out) as out:
        return _run(config, out)


def _run(config: DataReportConfig, out: Path) -> dict[str, Any]:
    started = time.monotonic()
    device = make_accelerator(config.device).device
    teacher = Teacher.load(config.teacher, device, config)
    students = [Teacher.load(path, device) for path in config.students]
    for network in (teacher, *students) if students else ():
        if getattr(network.network, "num_features", None) != 2:
            raise ConfigError(
                f"students: {network.name} has no two pooled features to draw, accepted: networks like "
                "gap2, and such a "
                "teacher"
            )
    images = open_images(config, image_size=teacher.described.image_size, device=device)
    with closing(images), Progress(enabled=config.progress) as progress:
        seen, metrics = measure(config, teacher, images, progress)
        metrics["seconds"] = round(time.monotonic() - started, 3)
        page = data_page.build(config, teacher, students, images, seen, metrics)
        target = render_pages(
            [page],
            out / PAGE,
            title=page.name,
            sources=[Path(config.data).name, f"{teacher.name}/model.safetensors"],
        )
    files.write_json(out / METRICS, metrics)
    shown = {key: value for key, value in metrics.items() if not isinstance(value, (dict, list))}
    return {**shown, "report": str(target)}
