"""``kdfast synth``: labelled synthetic images, written as shards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdfast.data.manifest import is_shard_folder, read_manifest
from kdfast.data.writer import ShardWriteError
from kdfast.diffusion.notes import SCORES, noted
from kdfast.documents import Fields
from kdfast.errors import ConfigError, DataError
from kdfast.experiments.common.results import METRICS, writing
from kdfast.experiments.synth import procedural as synth_procedural
from kdfast.experiments.synth.config import SynthConfig
from kdfast.experiments.synth.generator import load_generator
from kdfast.experiments.synth.scorer import load_scorer
from kdfast.training import files
from kdfast.training.accelerator import make_accelerator
from kdfast.training.progress import Progress, Task


def run(config: SynthConfig) -> dict[str, Any]:
    """Make the set, or this process's share of it.

    Returns:
        What ``metrics.json`` holds: ``images``, ``refused`` (non-finite latents, drawn again; GLSL files left out,
        which ``left_out`` lists with the driver's words), ``seconds`` of this call, ``images_per_second`` without the
        time that loading the model took, ``score`` where there is a scorer, and ``settings`` that a report can plot
        against.

    Raises:
        ConfigError: A value makes no sense for this model.
        CheckpointError: The weights cannot be read, or do not match their config; the message names the keys.
        ShardError: ``out`` holds another run's set, or cannot be written.
    """
    accelerator = make_accelerator(config.device)
    with writing(config.out, main=accelerator.is_main_process, refusal=ShardWriteError) as folder:
        return _run(config, accelerator, folder)


def _run(config: SynthConfig, accelerator: Any, folder: Path) -> dict[str, Any]:
    started = time.monotonic()
    config = _going_on(config, folder)
    with Progress(enabled=config.progress and accelerator.is_main_process) as progress:
        bar = _Bar(progress)
        faults: list[str] = []
        if config.source == "diffusion":
            written, refused, complete = _write_diffusion(config, accelerator, bar)
        else:
            written, faults, complete = synth_procedural.write(config, accelerator, bar)
            refused = len(faults)
    seconds = time.monotonic() - started
    metrics = {
        "source": config.source,
        "images": config.images,
        "refused": refused,
        "seconds": round(seconds, 3),
        "images_per_second": round(written / max(bar.seconds, 1e-9), 2),
        **_sampled(config, folder),
        **({"left_out": faults} if faults else {}),
    }
    if complete and (written or not (folder / METRICS).exists()):
        files.write_json(folder / METRICS, metrics)
    return metrics


def _going_on(config: SynthConfig, folder: Path) -> SynthConfig:
    """What is there is grown on purpose only, and never passed for a set of another size.

    Raises:
        ConfigError: ``extend`` without a smaller set, or ``resume`` of a finished set of another size.
    """
    found = read_manifest(folder) if is_shard_folder(folder) else None
    held = 0 if found is None else found.num_samples
    if config.extend:
        if not held:
            raise ConfigError(
                f"extend: got true, but {folder} holds no set yet; accepted: false, which begins one"
            )
        if held >= config.images:
            raise ConfigError(
                f"images: got {config.images}, accepted with extend: above {held:,}, which {folder} holds already"
            )
        return replace(config, resume=True)
    if config.resume and found is not None and found.complete and held != config.images:
        raise ConfigError(
            f"images: got {config.images}, accepted: {held:,}, which {folder} holds, a finished set; --extend grows it"
        )
    return config


def _sampled(config: SynthConfig, folder: Path) -> dict[str, Any]:
    """What a report plots a diffusion model's sets against, and the scorer's mean."""
    if config.source != "diffusion":
        return {}
    settings = {"guidance_scale": config.guidance_scale, "steps": config.steps, "sampler": config.sampler}
    scores = [Fields(entry, folder / SCORES, DataError).number("score") for entry in noted(folder / SCORES)]
    return {"settings": settings, **({"score": sum(scores) / len(scores)} if scores else {})}


class _Bar:
    """Opens a progress bar when it hears of the first count, so that its rate leaves out what was there before."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Task | None = None
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the first count."""
        return time.monotonic() - self._started

    def __call__(self, done: int, total: int) -> None:
        if self._task is None:
            self._started = time.monotonic()
            self._task = self._progress.task("synth", total, unit="img", completed=done)
        else:
            self._task.advance(done - self._task.completed)


def _write_diffusion(
    config: SynthConfig, accelerator: Any, bar: Callable[[int, int], None]
) -> tuple[int, int, bool]:
    synthesizer = load_generator(config, accelerator.device)
    known = 1 + max(config.classes) if config.classes else synthesizer.num_classes
    result = synthesizer.write(
        config.out,
        config.images,
        classes=config.classes,
        batch_size=config.batch_size,
        **config.written,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        scorer=load_scorer(config.scorer, accelerator.device, known),
        on_progress=bar,
    )
    return result.written, result.refused, result.complete
