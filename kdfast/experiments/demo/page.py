"""What the demo shows: sample grids for its page, and a table of accuracies in the terminal."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch

from kdfast.data import ShardLoader, load_dataset
from kdfast.errors import require
from kdfast.experiments.demo.config import DemoConfig
from kdfast.experiments.demo.phases import NOISE, SYNTHETIC
from kdfast.report.grid import write_grid

_GRID = 10, 6  # columns, one a class, and rows


def draw_grids(config: DemoConfig, out: Path) -> dict[str, str]:
    """Sample grids, a class a column; returns a caption for each."""
    columns, rows = _GRID
    real = load_dataset("digits", "train", image_size=config.image_size)
    by_class = [iter((real.labels == label).nonzero().flatten().tolist()) for label in range(columns)]
    picked = torch.stack([real[next(rows_of)][0] for _ in range(rows) for rows_of in by_class])
    write_grid(out / "samples-1-real.png", picked, columns=columns)
    for name, folder in (("samples-2-synthetic.png", SYNTHETIC), ("samples-3-noise.png", NOISE)):
        write_grid(out / name, _first_images(config, out / folder, columns * rows), columns=columns)
    return {
        "samples-1-real.png": "Real digits: only the teacher and the diffusion model saw these.",
        "samples-2-synthetic.png": f"Synthetic digits, a class a column, guidance {config.guidance_scale:g}, "
        f"{config.steps} steps: what the students saw.",
        "samples-3-noise.png": "Noise: what the last student saw.",
    }


def _first_images(config: DemoConfig, folder: Path, count: int) -> torch.Tensor:
    with ShardLoader(folder, min(count, config.images), shuffle=False, loader=config.loader) as loader:
        images, _ = next(islice(loader, 1))
    return (images * 255).round().to(torch.uint8)


def print_table(metrics: dict[str, Any], page: Path) -> None:
    """The four accuracies, and where the page is, on standard error."""
    table = require("rich.table", extra="train", feature="The demo").Table(box=None, pad_edge=False)
    table.add_column("accuracy on held-out real digits")
    table.add_column("", justify="right")
    for name, key in (
        ("teacher, trained on real digits", "teacher_accuracy"),
        ("student, synthetic digits with soft labels", "student_accuracy"),
        ("student, synthetic digits with hard labels", "student_hard_label_accuracy"),
        ("student, noise with soft labels", "student_noise_accuracy"),
    ):
        style = "bold" if key == "student_accuracy" else ""
        table.add_row(name, f"{100 * metrics[key]:.1f} %", style=style)
    console = require("rich.console", extra="train", feature="The demo").Console(stderr=True)
    console.print(
        "", table, f"\n{metrics['seconds']:.0f} seconds. See {page}", highlight=False, soft_wrap=True
    )
