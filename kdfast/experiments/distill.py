"""``kdfast distill``: from a recipe to a trained student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kdfast.data import read_manifest
from kdfast.data.loader import ShardLoader
from kdfast.data.manifest import Manifest
from kdfast.errors import CheckpointError, ConfigError, DataError
from kdfast.experiments.common import (
    METRICS,
    Count,
    Evaluator,
    TrainingRecipe,
    close_run,
    fingerprint,
    held_out,
    open_run,
    summarise,
)
from kdfast.experiments.recipe import build_config, check_keys
from kdfast.experiments.teach import build_network
from kdfast.methods.dmkd import DMKD, DMKDConfig
from kdfast.models import create_model
from kdfast.training import files
from kdfast.training.accelerator import make_accelerator
from kdfast.training.model_io import ModelConfig, load_model, load_model_config
from kdfast.training.rng import seed_everything
from kdfast.training.trainer import Trainer

# Methods that a recipe can name: their config, and what makes them of teacher and config.
METHODS: dict[str, tuple[type, Any]] = {"dmkd": (DMKDConfig, DMKD)}


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainingRecipe):
    """Who teaches whom, on which images. The fields of the method's own config stand beside these in a recipe.

    Attributes:
        method: ``dmkd``.
        teacher: Directory of a trained network, or ``timm:NAME`` for timm's with its weights.
        student: Name for :func:`kdfast.models.create_model`.
        data: Directory of shards.
        test_data: Held-out real images to measure on: ``digits``, a folder, or ``hf:NAME``; ``None`` measures nothing.
        label_column: For ``hf:`` test data with several class columns, which one to use.
        image_size: Side the networks see; by default the teacher's.
        load_size: Side the images are decoded to, before ``augment``; by default ``image_size``.
        loader: ``dali``, or ``torch`` for the plain loader.
        on_error: ``raise`` at a damaged image, or ``skip`` and list it.
    """

    method: str = "dmkd"
    teacher: str
    student: str
    data: str
    test_data: str | None = None
    label_column: str | None = None
    image_size: Count | None = None
    load_size: Count | None = None
    loader: Literal["dali", "torch"] = "dali"
    on_error: Literal["raise", "skip"] = "raise"


def parse(values: Mapping[str, Any], *, source: str = "recipe") -> tuple[DistillConfig, Any]:
    """A recipe's values as the common config and the method's.

    Raises:
        ConfigError: For an unknown method, an unknown key (with the nearest known one) or an invalid value.
    """
    name = values.get("method", "dmkd")
    if name not in METHODS:
        # Keys come first: a slip in one of them is likelier than a method that does not exist.
        check_keys(values, DistillConfig, *(schema for schema, _ in METHODS.values()), source=source)
        raise ConfigError(f"{source}: method: got {name!r}, accepted: {', '.join(METHODS)}")
    schema = METHODS[name][0]
    check_keys(values, DistillConfig, schema, source=source)
    return build_config(DistillConfig, values, source=source), build_config(schema, values, source=source)


def run(
    config: DistillConfig,
    method_config: Any,
    out: str | Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Distil one student.

    Args:
        config: Networks, data and training.
        method_config: The method's own config.
        out: Result directory, as :func:`kdfast.experiments.teach.run` fills it.
        resume: Go on from its latest checkpoint.
        dry_run: Build everything, take one real optimiser step, write nothing.
        progress: Show a progress bar.

    Returns:
        What ``metrics.json`` holds; of a dry run the ``loss``.

    Raises:
        ConfigError: A network is unknown, or ``out`` holds another run.
        DataError: The shards or the test images cannot be used, or have other classes than the teacher.
        CheckpointError: The teacher cannot be read.
        TrainingInterrupted: On Ctrl-C, after a checkpoint.
    """
    manifest = read_manifest(config.data)
    teacher, taught = load_teacher(config.teacher, manifest.num_classes)
    described = replace(
        taught,
        model=config.student,
        image_size=config.image_size or taught.image_size,
        options=config.model_options(),
    )
    _check_classes(config, method_config, manifest, described)
    accelerator = make_accelerator(config.device, config.precision)
    rank = (accelerator.process_index, accelerator.num_processes)
    test = held_out(config.test_data, described, config.label_column)
    seed_everything(config.seed)
    student = build_network(described)
    method = METHODS[config.method][1](teacher.to(accelerator.device), config=method_config)
    with _loader(config, described, accelerator) as batches:
        folder = None
        if not dry_run:
            folder = open_run(out, config, method_config, resume=resume, main=accelerator.is_main_process)
        trainer = Trainer(
            student,
            lambda model, batch: method.step(batch, model),
            config.trainer_config(progress=progress),
            out=folder,
            evaluate=None if test is None else Evaluator(test, described, batch_size=256, trainer_rank=rank),
            fingerprint=fingerprint(config, method_config),
            name="distill",
        )
        if folder is None:
            return {"loss": trainer.dry_run(batches)}
        result = trainer.fit(batches, resume=resume)
        skipped = {"quarantined": len(batches.quarantined)} if batches.quarantined else {}
        return close_run(folder, trainer, result, described, seed=config.seed, **skipped)


def run_seeds(
    config: DistillConfig,
    method_config: Any,
    out: str | Path,
    *,
    seeds: int,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Distil once for each of ``seeds`` seeds, from the recipe's on, into ``out/seed-N``.

    Returns:
        What ``out/metrics.json`` holds: every metric's values, ``…_mean`` and ``…_std`` (sample standard deviation).
    """
    root = Path(out)
    runs = []
    for seed in range(config.seed, config.seed + seeds):
        one = replace(config, seed=seed)
        runs.append(run(one, method_config, root / f"seed-{seed}", resume=resume, progress=progress))
    summary = summarise(runs)
    if make_accelerator(config.device, config.precision).is_main_process:
        files.write_json(root / METRICS, summary)
    return summary


def load_teacher(source: str, num_classes: int | None = None) -> tuple[nn.Module, ModelConfig]:
    """A trained network and what feeds it.

    Args:
        source: Directory of a finished run, or ``timm:NAME``.
        num_classes: For ``timm:``; by default 1000.

    Raises:
        CheckpointError: It cannot be read.
        ConfigError: timm has no such network.
    """
    if not source.startswith("timm:"):
        return load_model(source), load_model_config(source)
    try:
        network = create_model(source, num_classes or 1000, pretrained=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"teacher {source}: its weights cannot be had: {error}") from error
    facts = getattr(network, "pretrained_cfg", {})
    return network.eval(), ModelConfig(
        source,
        num_classes or 1000,
        int(facts.get("input_size", (3, 224, 224))[-1]),
        tuple(facts.get("mean", (0.485, 0.456, 0.406))),
        tuple(facts.get("std", (0.229, 0.224, 0.225))),
    )


def _check_classes(config: DistillConfig, method_config: Any, manifest: Manifest, model: ModelConfig) -> None:
    """Stored labels count as the teacher's classes; where they do not matter any images will do."""
    stored = getattr(method_config, "labels", "soft") != "soft" and method_config.hard_labels == "stored"
    if stored and manifest.num_classes is not None and manifest.num_classes != model.num_classes:
        raise DataError(
            f"data {config.data}: has {manifest.num_classes} classes, accepted: the teacher's {model.num_classes}"
        )


def _loader(config: DistillConfig, model: ModelConfig, accelerator: Any) -> ShardLoader:
    return ShardLoader(
        config.data,
        config.batch_size,
        device=accelerator.device,
        image_size=config.load_size or model.image_size,
        augment=config.augmentation(model.image_size),
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        on_error=config.on_error,
        last_batch="fill",  # full batches everywhere: ranks in step, shapes that compile once
        loader=config.loader,
        mean=model.mean,
        std=model.std,
        num_workers=config.workers,
    )
