"""``kdfast demo``: the whole of DM-KD in miniature, on real images, in minutes.

A teacher learns scikit-learn's handwritten digits. A small diffusion transformer learns to make them. Its images go
through shards and DALI to a student that never sees a real one, with the teacher's soft labels; beside it, for
comparison, a student that gets hard labels, and one that gets noise for images. All are measured on digits that nobody
has seen.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kdfast.documents import read_json, shown
from kdfast.errors import ConfigError, DataError, require_all
from kdfast.experiments.common.results import LOCK, METRICS, out_directory, writing
from kdfast.experiments.demo.config import DemoConfig
from kdfast.experiments.demo.page import draw_grids, print_table
from kdfast.experiments.demo.phases import FROM_NOISE, HARD, SOFT, TEACHER, phases
from kdfast.report.page import write_report
from kdfast.training import files

SETTINGS = "demo.json"
# These choose where and how to go on, not what comes out.
_FREE = ("out", "resume", "progress", "device")


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
    with writing(config.out):
        return _run(config)


def _run(config: DemoConfig) -> dict[str, Any]:
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
        print_table(metrics, page)
    result = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
    return {**result, "report": str(page)}


def _run_phases(config: DemoConfig, out: Path) -> dict[str, dict[str, Any]]:
    """What each phase measured, after running those that are not done."""
    done = {}
    planned = phases(config, out)
    for number, (name, (title, work)) in enumerate(planned.items(), 1):
        finished = out / name / METRICS
        if not finished.exists():
            _say(config, f"{number}/{len(planned)}  {title}")
            work()
        done[name] = _read(finished)
        _say(config, f"{number}/{len(planned)}  {title}: {_outcome(done[name])}")
    return done


def _read(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path, error=DataError)
    except FileNotFoundError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: holds {shown(document)}, accepted: an object")
    return document


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
        "captions": draw_grids(config, out),
        "seconds_by_phase": {name: round(phase["seconds"], 1) for name, phase in done.items()},
        "settings": {**_identity(config), "torch": torch.__version__, "device": _device_name(config)},
    }


def _open(config: DemoConfig) -> Path:
    """The directory, claimed for these settings."""
    out = out_directory(config.out)
    if not (out / SETTINGS).exists():
        if any(path.name != LOCK for path in out.iterdir()):
            raise ConfigError(f"--out: {out} is not empty and holds no demo; choose another directory")
        files.write_json(out / SETTINGS, _identity(config))
        return out
    if not config.resume:
        raise ConfigError(
            f"--out: {out} holds a demo already; go on with --resume, or choose another directory"
        )
    before, now = _read(out / SETTINGS), _identity(config)
    if changed := [key for key in now if before.get(key) != now[key]]:
        details = "; ".join(f"{key}: {shown(before.get(key))} before, {now[key]!r} now" for key in changed)
        raise ConfigError(
            f"--out: {out} holds a demo with other settings ({details}); choose another directory"
        )
    return out


def _check_packages(config: DemoConfig) -> None:
    """Say what is missing now instead of minutes into the work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the demo runs in one process; start it without torchrun or accelerate launch")
    modules = {
        "simplejpeg": "dali",
        "diffusers": "diffusion",
        "accelerate": "train",
        "safetensors": "train",
        "sklearn": "train",
        "matplotlib": "report",
        "jinja2": "report",
    }
    feature = "The demo"
    if config.loader == "dali":
        modules, feature = {"nvidia.dali": "dali", **modules}, "The demo (without DALI: --loader torch)"
    require_all(modules, feature=feature)


def _identity(config: DemoConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if key not in _FREE}


def _device_name(config: DemoConfig) -> str:
    if config.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "CPU"


def _say(config: DemoConfig, line: str) -> None:
    if config.progress:
        print(line, file=sys.stderr, flush=True)


def _outcome(metrics: dict[str, Any]) -> str:
    parts = [f"{metrics['seconds']:.0f} s"]
    if "accuracy" in metrics:
        parts.insert(0, f"{100 * metrics['accuracy']:.1f} % of held-out digits")
    elif "loss" in metrics:
        parts.insert(0, f"held-out loss {metrics['loss']:.4f}")
    elif "images_per_second" in metrics:
        parts.insert(0, f"{metrics['images_per_second']:,.0f} images/s")
    return ", ".join(parts)
