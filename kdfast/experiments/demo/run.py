"""``kdfast demo``: the whole of DM-KD in miniature, on real images, in minutes.

A teacher learns scikit-learn's handwritten digits. A small diffusion transformer learns to make them. Its images go
through shards and DALI to a student that never sees a real one, with the teacher's soft labels; beside it, for
comparison, a student that gets hard labels, and one that gets noise for images. All are measured on digits that nobody
has seen.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types as at
import torch

from kdfast.data import ShardLoader, load_dataset
from kdfast.errors import ConfigError, require
from kdfast.experiments.common.results import METRICS, Count, Positive
from kdfast.experiments.diffusion_model import run as diffusion_model
from kdfast.experiments.distill import run as distill
from kdfast.experiments.synth import run as synth
from kdfast.experiments.teach import run as teach
from kdfast.methods.dmkd import DMKDConfig
from kdfast.report.grid import write_grid
from kdfast.report.page import write_report
from kdfast.training import files

SETTINGS = "demo.json"
TEACHER, DIFFUSION, SYNTHETIC, NOISE = "teacher", "diffusion", "synthetic", "noise"
SOFT, HARD, FROM_NOISE = "student-soft", "student-hard", "student-noise"
_GRID = 10, 6  # columns, one a class, and rows
# These choose where and how to go on, not what comes out.
_FREE = ("out", "resume", "progress", "device")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo; the defaults take about four minutes on two CPU cores.

    Attributes:
        out: Directory for everything.
        seed: Same seed, same numbers.
        image_size: Side of the digits in pixels.
        model: Network of teacher and students.
        teacher_epochs: Passes of the teacher over the 1437 real training digits.
        diffusion_steps: Optimiser steps of the diffusion model.
        images: How many it makes, and how many noise images there are.
        steps: Denoising steps an image.
        guidance_scale: s of classifier-free guidance.
        student_epochs: Passes of each student over its images.
        temperature: τ.
        batch_size: Images a training step.
        samples_per_shard: Images a shard; a stopped run makes at most so many again.
        loader: ``dali``, or ``torch`` for the plain loader.
        device: ``auto`` takes the GPU if there is one.
        resume: Go on where an earlier demo in ``out`` stopped.
        progress: Show what is going on.
    """

    out: str = "runs/demo"
    seed: Annotated[int, at.Ge(0)] = 0
    image_size: Count = 16
    model: str = "resnet8"
    teacher_epochs: Count = 12
    diffusion_steps: Count = 1000
    images: Count = 2000
    steps: Count = 25
    guidance_scale: Annotated[float, at.Ge(1)] = 2.0
    student_epochs: Count = 10
    temperature: Positive = 10.0
    batch_size: Count = 64
    samples_per_shard: Count = 500
    loader: Literal["dali", "torch"] = "dali"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: bool = False
    progress: bool = True


def run(config: DemoConfig) -> dict[str, Any]:
    """Run the demo, or what is left of it.

    Each phase keeps its own directory below ``out`` and is done when its ``metrics.json`` is there, written last.

    Returns:
        The numbers of ``out/metrics.json`` that matter: the accuracies as fractions, ``images``, ``seconds`` and where
        the page is.

    Raises:
        ConfigError: ``out`` holds something else, or a demo with other settings, or one and ``resume`` is false.
        MissingExtraError: A package is missing; said before any work is done.
        TrainingInterrupted: On Ctrl-C, after a checkpoint.
    """
    _check_packages(config)
    out = _open(config)
    threads = torch.get_num_threads()
    # Networks this small gain little from a second thread and lose minutes on a busy machine, where each of a step's
    # hundreds of joins waits for the slower one. One thread also makes the numbers the same on any number of cores.
    torch.set_num_threads(1)
    try:
        done = _run_phases(config, out)
    finally:
        torch.set_num_threads(threads)
    metrics = _summary(config, out, done)
    files.write_json(out / METRICS, metrics)
    page = write_report([out])
    if config.progress:
        _print_table(metrics, page)
    result = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
    return {**result, "report": str(page)}


def _run_phases(config: DemoConfig, out: Path) -> dict[str, dict[str, Any]]:
    """What each phase measured, after running those that are not done."""
    done = {}
    phases = _phases(config, out)
    for number, (name, (title, work)) in enumerate(phases.items(), 1):
        finished = out / name / METRICS
        if not finished.exists():
            _say(config, f"{number}/{len(phases)}  {title}")
            work()
        done[name] = json.loads(finished.read_text())
        _say(config, f"{number}/{len(phases)}  {title}: {_outcome(done[name])}")
    return done


def _phases(config: DemoConfig, out: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    common: dict[str, Any] = {
        "batch_size": config.batch_size,
        "lr": 0.05,
        "nesterov": True,
        "schedule": "cosine",
        "seed": config.seed,
        "device": config.device,
        "checkpoint_every": 3,
        "log_every": 10,
    }
    work: dict[str, Any] = {"resume": True, "progress": config.progress}

    def teacher() -> Any:
        settings = teach.TeachConfig(
            data="digits",
            model=config.model,
            image_size=config.image_size,
            epochs=config.teacher_epochs,
            **common,
        )
        return teach.run(settings, out / TEACHER, **work)

    def diffusion() -> Any:
        per_epoch = min(100, config.diffusion_steps)
        settings = diffusion_model.DiffusionConfig(
            image_size=config.image_size,
            epochs=-(-config.diffusion_steps // per_epoch),
            steps_per_epoch=per_epoch,
            batch_size=config.batch_size,
            seed=config.seed,
            device=config.device,
        )
        return diffusion_model.run(settings, out / DIFFUSION, **work)

    def images(source: Literal["diffusion", "noise"], name: str) -> Any:
        settings = synth.SynthConfig(
            out=str(out / name),
            source=source,
            images=config.images,
            weights=str(out / DIFFUSION),
            steps=config.steps,
            guidance_scale=config.guidance_scale,
            image_size=config.image_size,
            num_classes=10,
            seed=config.seed,
            batch_size=min(250, config.samples_per_shard),
            samples_per_shard=config.samples_per_shard,
            device=config.device,
            **work,
        )
        return synth.run(settings)

    def student(name: str, data: str, labels: Literal["soft", "hard"]) -> Any:
        settings = distill.DistillConfig(
            teacher=str(out / TEACHER),
            student=config.model,
            data=str(out / data),
            test_data="digits",
            epochs=config.student_epochs,
            loader=config.loader,
            **common,
        )
        method = DMKDConfig(temperature=config.temperature, labels=labels, cutmix_alpha=None)
        return distill.run(settings, method, out / name, **work)

    return {
        TEACHER: ("Teacher on real digits", teacher),
        DIFFUSION: ("Diffusion model on real digits", diffusion),
        SYNTHETIC: (f"{config.images:,} synthetic digits", lambda: images("diffusion", SYNTHETIC)),
        NOISE: (f"{config.images:,} images of noise", lambda: images("noise", NOISE)),
        SOFT: ("Student: synthetic digits, soft labels", lambda: student(SOFT, SYNTHETIC, "soft")),
        HARD: ("Student: synthetic digits, hard labels", lambda: student(HARD, SYNTHETIC, "hard")),
        FROM_NOISE: ("Student: noise, soft labels", lambda: student(FROM_NOISE, NOISE, "soft")),
    }


def _summary(config: DemoConfig, out: Path, done: dict[str, Any]) -> dict[str, Any]:
    accuracies = {
        "teacher_accuracy": done[TEACHER]["accuracy"],
        "student_accuracy": done[SOFT]["accuracy"],
        "student_hard_label_accuracy": done[HARD]["accuracy"],
        "student_noise_accuracy": done[FROM_NOISE]["accuracy"],
    }
    return {
        **accuracies,
        "images": config.images,
        "seconds": round(sum(phase["seconds"] for phase in done.values()), 1),
        "captions": _grids(config, out),
        "seconds_by_phase": {name: round(phase["seconds"], 1) for name, phase in done.items()},
        "settings": {**_identity(config), "torch": torch.__version__, "device": _device_name(config)},
    }


def _grids(config: DemoConfig, out: Path) -> dict[str, str]:
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


def _open(config: DemoConfig) -> Path:
    """The directory, claimed for these settings."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: got {out}, which is a file, accepted: a directory")
    if not (out / SETTINGS).exists():
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"--out: {out} is not empty and holds no demo; choose another directory")
        with files.reporting_disk(out):
            out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / SETTINGS, _identity(config))
        return out
    if not config.resume:
        raise ConfigError(
            f"--out: {out} holds a demo already; go on with --resume, or choose another directory"
        )
    before, now = json.loads((out / SETTINGS).read_text()), _identity(config)
    if changed := [key for key in now if before.get(key) != now[key]]:
        details = "; ".join(f"{key}: {before.get(key)!r} before, {now[key]!r} now" for key in changed)
        raise ConfigError(
            f"--out: {out} holds a demo with other settings ({details}); choose another directory"
        )
    return out


def _check_packages(config: DemoConfig) -> None:
    """Say what is missing now instead of minutes into the work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the demo runs in one process; start it without torchrun or accelerate launch")
    if config.loader == "dali":
        require("nvidia.dali", extra="dali", feature="The demo (its declared alternative: --loader torch)")
    for module, extra in (
        ("simplejpeg", "dali"),
        ("diffusers", "diffusion"),
        ("sklearn", "train"),
        ("matplotlib", "report"),
        ("jinja2", "report"),
    ):
        require(module, extra=extra, feature="The demo")


def _identity(config: DemoConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if key not in _FREE}


def _device_name(config: DemoConfig) -> str:
    if config.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "CPU"


def _say(config: DemoConfig, line: str) -> None:
    if config.progress:
        print(line, file=sys.stderr, flush=True)


def _print_table(metrics: dict[str, Any], page: Path) -> None:
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


def _outcome(metrics: dict[str, Any]) -> str:
    parts = [f"{metrics['seconds']:.0f} s"]
    if "accuracy" in metrics:
        parts.insert(0, f"{100 * metrics['accuracy']:.1f} % of held-out digits")
    elif "loss" in metrics:
        parts.insert(0, f"held-out loss {metrics['loss']:.4f}")
    elif "images_per_second" in metrics:
        parts.insert(0, f"{metrics['images_per_second']:,.0f} images/s")
    return ", ".join(parts)
