"""``kdfast distill``: from a recipe to a trained student."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdfast.errors import ConfigError
from kdfast.experiments.common.held_out import Evaluator, held_out, splits_itself
from kdfast.experiments.common.networks import at_side, build_network, load_teacher, told
from kdfast.experiments.common.opening import Speaker, parameters_of, say_checked, say_closing, say_training
from kdfast.experiments.common.recipe import build_config, check_keys
from kdfast.experiments.common.results import (
    METRICS,
    best_keeper,
    close_run,
    fingerprint,
    open_run,
    summarise,
)
from kdfast.experiments.distill.config import DistillConfig
from kdfast.experiments.distill.data import open_training_data
from kdfast.experiments.distill.methods import METHODS, get_method
from kdfast.experiments.distill.plan import Setting, uses_labels
from kdfast.experiments.distill.stored import StoredBatches, StoredTeacher, open_stored, with_labels
from kdfast.experiments.distill.teacher import measure_teacher, say_distillation, share_kept
from kdfast.training import files
from kdfast.training.accelerator import make_accelerator
from kdfast.training.rng import seed_everything
from kdfast.training.trainer import Trainer


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
    values = with_labels(values, source=source)
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
    talk: bool = True,
) -> dict[str, Any]:
    """Distil one student.

    Args:
        config: Networks, data and training.
        method_config: The method's own config.
        out: Result directory, as :func:`kdfast.experiments.teach.run.run` fills it.
        resume: Go on from its latest checkpoint.
        dry_run: Build everything, take one real optimiser step, write nothing.
        progress: Show a progress bar.
        talk: With it, say first who learns from whom on what, and at the end how much of it.

    Returns:
        What ``metrics.json`` holds; of a dry run the ``loss``.

    Raises:
        ConfigError: A network is unknown, or ``out`` holds another run.
        DataError: The shards or the test images cannot be used, or have other classes than the teacher.
        CheckpointError: The teacher cannot be read.
        TrainingInterrupted: On Ctrl-C, after a checkpoint.
    """
    stored = open_stored(config, method_config)
    if stored is None:
        teacher, taught = load_teacher(config.teacher, config, image_size=config.image_size)
    else:
        teacher, taught = StoredTeacher(), told(stored.described, config)
    # Stored labels are of images of one size, which may not be the teacher's.
    side = config.image_size or (None if stored is None else stored.image_size)
    fed_at = at_side(taught, side, config.crop_pct)
    described = replace(fed_at, model=config.student, options=config.model_options())
    accelerator = make_accelerator(config.device, config.precision)
    rank = (accelerator.process_index, accelerator.num_processes)
    whole = not splits_itself(config.data, config.test_data)
    test = held_out(config.test_data, described, config.label_column, task=config.task, whole=whole)
    # Before the seed is set: measuring draws random numbers.
    known = {} if stored else measure_teacher(teacher.to(accelerator.device), taught, config, test, rank)
    seed_everything(config.seed)
    student = build_network(described).to(accelerator.device)
    teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
    # What the method and its data see of the batch; the record and the log keep the whole.
    mine = replace(config, batch_size=config.share(rank[1]))
    setting = Setting(
        mine, method_config, teacher, student, described, accelerator, taught.num_classes, dry_run
    )
    with ExitStack() as stack:
        plan = get_method(config.method).build(setting)
        plain = not plan.normalised or stored is not None
        fed = replace(described, mean=(0.0,) * 3, std=(1.0,) * 3) if plain else described
        labelled = uses_labels(get_method(config.method), method_config)
        batches = plan.batches or open_training_data(
            mine, fed, accelerator, stack, labelled=labelled, records=stored is not None
        )
        step = plan.step
        if stored is not None and isinstance(teacher, StoredTeacher):
            form = (described.mean, described.std) if plan.normalised else None
            step = StoredBatches(stored, batches, teacher, plan.step, form)
        evaluator = None
        if test is not None:
            evaluator = Evaluator(test, described, batch_size=256, trainer_rank=rank, workers=config.workers)
        folder = None
        if not dry_run:
            folder = open_run(out, config, method_config, resume=resume, main=accelerator.is_main_process)
        trainer = Trainer(
            plan.model,
            step,
            config.trainer_config(progress=progress),
            out=folder,
            evaluate=None if evaluator is None else lambda model: evaluator(plan.student(model)),
            fingerprint=fingerprint(config, method_config),
            name="distill",
            keep_best=best_keeper(folder, plan.student),
        )
        speaker = Speaker(progress and talk and accelerator.is_main_process)
        networks = {
            "teacher": (
                config.teacher,
                parameters_of(teacher) if stored is None else stored.teacher_parameters,
            ),
            "student": (config.student, parameters_of(student)),
        }
        say_distillation(speaker, config, batches, test, described.image_size, networks, known)
        say_training(speaker, config, trainer.steps_of(batches), accelerator)
        if folder is None:
            loss = trainer.dry_run(batches)
            measured = "the test images, by the teacher" if known else "the test images"
            seen = "no test_data, so nothing will be measured" if test is None else measured
            say_checked(speaker, loss, "every key of the recipe", "teacher, student and data", seen)
            return {"loss": loss}
        result = trainer.fit(batches, resume=resume)
        result = replace(result, model=plan.student(result.model))
        facts = {**known, **plan.facts(), "parameters": networks["student"][1]}
        facts |= {"teacher_parameters": networks["teacher"][1], **share_kept(result.metrics, known)}
        if skipped := getattr(batches, "quarantined", ()):
            facts["quarantined"] = len(skipped)
        if evaluator is not None and (by_class := evaluator.by_class(result.model)):
            facts["class_accuracy"] = by_class
        if accelerator.is_main_process:
            plan.leave(folder)
        metrics = close_run(folder, trainer, result, described, seed=config.seed, **facts)
    say_closing(speaker, folder, metrics, **networks)
    return metrics


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
