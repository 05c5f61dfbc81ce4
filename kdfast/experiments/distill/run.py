"""``kdfast distill``: from a recipe to a trained student."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kdfast.errors import CheckpointError, ConfigError
from kdfast.experiments.common.recipe import build_config, check_keys
from kdfast.experiments.common.results import (
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
from kdfast.experiments.distill.data import open_training_data, shard_classes
from kdfast.experiments.distill.plan import METHODS, Setting, get_method
from kdfast.experiments.teach.run import build_network
from kdfast.models import create_model
from kdfast.training import files
from kdfast.training.accelerator import make_accelerator
from kdfast.training.model_io import ModelConfig, load_model, load_model_config
from kdfast.training.rng import seed_everything
from kdfast.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainingRecipe):
    """Who teaches whom, on which images. The fields of the method's own config stand beside these in a recipe.

    Attributes:
        method: One of :data:`kdfast.experiments.distill.plan.METHODS`.
        teacher: Directory of a trained network, or ``timm:NAME`` or ``torchvision:NAME`` for theirs with its weights.
        student: Name for :func:`kdfast.models.create_model`.
        task: ``classification``, or ``segmentation``, for which data are images beside PNG masks.
        data: What to train on: a directory of shards, or real labelled images (``digits``, a folder, ``hf:NAME``). Not
            needed by a method that makes its own.
        test_data: Held-out real images to measure on: ``digits``, a folder, or ``hf:NAME``; ``None`` measures nothing.
        label_column: For ``hf:`` data with several class columns, which one to use.
        data_images: Take only so many of real, labelled images, as many of each class, and keep them in memory.
        image_size: Side the networks see; by default the teacher's.
        load_size: Side the images are decoded to, before ``augment``; by default ``image_size``.
        loader: ``dali``, or ``torch`` for the plain loader.
        on_error: ``raise`` at a damaged image, or ``skip`` and list it.
    """

    method: str = "dmkd"
    teacher: str
    student: str
    task: Literal["classification", "segmentation"] = "classification"
    data: str | None = None
    test_data: str | None = None
    label_column: str | None = None
    data_images: Count | None = None
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
        check_keys(values, DistillConfig, *(get_method(each).CONFIG for each in METHODS), source=source)
        raise ConfigError(f"{source}: method: got {name!r}, accepted: {', '.join(METHODS)}")
    method = get_method(name)
    check_keys(values, DistillConfig, method.CONFIG, source=source)
    config = build_config(DistillConfig, values, source=source)
    if config.data is None and method.NEEDS_DATA:
        raise ConfigError(
            f"{source}: data: missing; accepted: a directory of shards (kdfast synth makes them), digits, a folder of "
            "images, hf:NAME"
        )
    return config, build_config(method.CONFIG, values, source=source)


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
        out: Result directory, as :func:`kdfast.experiments.teach.run.run` fills it.
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
    teacher, taught = load_teacher(config.teacher, config.data)
    described = replace(
        taught,
        model=config.student,
        image_size=config.image_size or taught.image_size,
        options=config.model_options(),
    )
    accelerator = make_accelerator(config.device, config.precision)
    rank = (accelerator.process_index, accelerator.num_processes)
    test = held_out(config.test_data, described, config.label_column, task=config.task)
    seed_everything(config.seed)
    student = build_network(described).to(accelerator.device)
    teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
    setting = Setting(
        config, method_config, teacher, student, described, accelerator, taught.num_classes, dry_run
    )
    with ExitStack() as stack:
        plan = get_method(config.method).build(setting)
        fed = described if plan.normalised else replace(described, mean=(0.0,) * 3, std=(1.0,) * 3)
        batches = plan.batches or open_training_data(config, fed, accelerator, stack)
        evaluator = None if test is None else Evaluator(test, described, batch_size=256, trainer_rank=rank)
        folder = None
        if not dry_run:
            folder = open_run(out, config, method_config, resume=resume, main=accelerator.is_main_process)
        trainer = Trainer(
            plan.model,
            plan.step,
            config.trainer_config(progress=progress),
            out=folder,
            evaluate=None if evaluator is None else lambda model: evaluator(plan.student(model)),
            fingerprint=fingerprint(config, method_config),
            name="distill",
        )
        if folder is None:
            return {"loss": trainer.dry_run(batches)}
        result = trainer.fit(batches, resume=resume)
        result = replace(result, model=plan.student(result.model))
        facts = dict(plan.facts())
        if skipped := getattr(batches, "quarantined", ()):
            facts["quarantined"] = len(skipped)
        if evaluator is not None and (by_class := evaluator.by_class(result.model)):
            facts["class_accuracy"] = by_class
        if accelerator.is_main_process:
            plan.leave(folder)
        return close_run(folder, trainer, result, described, seed=config.seed, **facts)


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


def load_teacher(source: str, data: str | None = None) -> tuple[nn.Module, ModelConfig]:
    """A trained network and what feeds it.

    Args:
        source: Directory of a finished run, ``timm:NAME`` or ``torchvision:NAME``.
        data: For the latter two, shards that say how many classes there are; 1000 without.

    Raises:
        CheckpointError: It cannot be read.
        ConfigError: timm or torchvision has no such network.
    """
    if not source.startswith(("timm:", "torchvision:")):
        return load_model(source), load_model_config(source)
    num_classes = shard_classes(data) or 1000
    try:
        network = create_model(source, num_classes, pretrained=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"teacher {source}: its weights cannot be had: {error}") from error
    facts = getattr(network, "pretrained_cfg", {})
    return network.eval(), ModelConfig(
        source,
        num_classes,
        int(facts.get("input_size", (3, 224, 224))[-1]),
        tuple(facts.get("mean", (0.485, 0.456, 0.406))),
        tuple(facts.get("std", (0.229, 0.224, 0.225))),
    )
