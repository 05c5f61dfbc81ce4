"""The result directory: what it holds, when it may be gone on in, and what several of them say together."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdfast.disk import Lock, sweep
from kdfast.errors import CheckpointError, ConfigError, KDFastError
from kdfast.experiments.common.recipe import to_yaml
from kdfast.report.compare import WHERE_AND_WHEN
from kdfast.training import files
from kdfast.training.checkpoint import latest_checkpoint
from kdfast.training.config import TrainResult
from kdfast.training.model_io import BEST, ModelConfig, save_model, save_weights
from kdfast.training.provenance import PROVENANCE, provenance
from kdfast.training.trainer import Trainer

RECIPE = "recipe.yaml"
METRICS = "metrics.json"
LOCK = ".run.lock"
#: The folders of a diffusion model, as diffusers names them.
TRANSFORMER, SCHEDULER = "transformer", "scheduler"


def fingerprint(*configs: Any) -> dict[str, Any]:
    """What a resumed run must agree on, as JSON would hold it: not where it works, and how often it says so."""
    merged = {
        key: value for config in configs for key, value in asdict(config).items() if key not in WHERE_AND_WHEN
    }
    result: dict[str, Any] = json.loads(json.dumps(merged))
    return result


def out_directory(out: str | Path) -> Path:
    """The result directory, which need not be there yet.

    Raises:
        ConfigError: It is a file.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: got {folder}, which is a file, accepted: a directory")
    return folder


def open_run(out: str | Path, *configs: Any, resume: bool, main: bool = True) -> Path:
    """Make the result directory and write the recipe into it.

    A run that is gone on with keeps the recipe that it began with: only keys that do not change its result may differ,
    and whether they do is for the trainer to say, which refuses without having touched anything.

    Raises:
        ConfigError: It holds a run already and ``resume`` is false, or it cannot be a directory.
    """
    folder = out_directory(out)
    if main:
        if not resume and ((folder / "checkpoints").exists() or (folder / METRICS).exists()):
            raise ConfigError(
                f"--out: {folder} holds a run already; go on with --resume, or choose another directory"
            )
        with files.reporting_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock_run(folder)
        if latest_checkpoint(folder / "checkpoints") is None or not (folder / RECIPE).exists():
            files.write_file(folder / RECIPE, to_yaml(*configs))
    return folder


def best_keeper(
    folder: Path | None, network: Callable[[nn.Module], nn.Module] = lambda model: model
) -> Callable[[nn.Module], None] | None:
    """What the trainer calls with the best network so far: it becomes the run's ``best.safetensors``.

    Args:
        folder: The result directory; ``None`` keeps nothing.
        network: From what is trained to what is saved.
    """
    return None if folder is None else lambda model: save_weights(folder / BEST, network(model))


#: Of this process, by folder; the kernel drops them when it ends.
_locks: dict[Path, Lock] = {}


def lock_run(folder: Path) -> None:
    """Claim a result directory for this process until it ends, or until :func:`close_run`, and sweep what died in it.

    Raises:
        ConfigError: Another process is writing there; the message names it.
    """
    place = folder.resolve()
    if place not in _locks:
        with files.reporting_disk(folder):
            _locks[place] = Lock(
                folder / LOCK, what=f"--out: {folder}", error=ConfigError, who="another run of kdfast"
            )
        sweep(folder)


def release_run(folder: Path) -> None:
    """Let others write there; nothing if it was not claimed."""
    if (lock := _locks.pop(folder.resolve(), None)) is not None:
        lock.release()


@contextlib.contextmanager
def writing(
    out: str | Path, *, main: bool = True, refusal: type[KDFastError] = CheckpointError
) -> Iterator[Path]:
    """Hold a result directory, made where it is missing, for a command that writes into it.

    Args:
        out: The directory.
        main: False for the other ranks of a run, whose first one holds it.
        refusal: What is raised where the directory cannot be made.

    Raises:
        ConfigError: It is a file, or another process is writing there; the message names it.
        CheckpointError: It cannot be made.
    """
    folder = out_directory(out)
    if not main or folder.resolve() in _locks:  # a phase of a command that holds it already
        yield folder
        return
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(f"{folder}: cannot be made: {error.strerror or error}") from error
    lock_run(folder)
    try:
        yield folder
    finally:
        if fresh and [path.name for path in folder.iterdir()] == [LOCK]:  # nothing came of it
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
                folder.rmdir()
        release_run(folder)


def close_run(
    folder: Path, trainer: Trainer, result: TrainResult, model: ModelConfig, **facts: Any
) -> dict[str, Any]:
    """Write the network and ``metrics.json``, last: its presence says that the run is finished."""
    metrics = {**result.metrics, "steps": result.steps, "images": result.images, **facts}
    metrics["seconds"] = round(result.seconds, 3)
    if trainer.accelerator.is_main_process:
        save_model(folder, result.model, model)
        files.write_json(folder / PROVENANCE, provenance(trainer.accelerator.device))
        files.write_json(folder / METRICS, metrics)
        release_run(folder)
    trainer.accelerator.wait_for_everyone()
    return metrics


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds of every metric that all runs have."""
    names = [name for name in runs[0] if all(isinstance(run.get(name), (int, float)) for run in runs)]
    summary: dict[str, Any] = {"seeds": [run["seed"] for run in runs]}
    for name in names:
        if name in ("seed", "steps", "images", "parameters", "teacher_parameters"):
            continue
        values = torch.tensor([float(run[name]) for run in runs], dtype=torch.float64)
        summary[name] = [float(value) for value in values]
        summary[f"{name}_mean"] = float(values.mean())
        summary[f"{name}_std"] = float(values.std()) if len(runs) > 1 else 0.0
    return summary
