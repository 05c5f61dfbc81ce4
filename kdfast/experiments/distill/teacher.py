"""How good the teacher is on the images that the student will be measured on, and what of that the student keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdfast.experiments.common.held_out import Evaluator, Labelled, held_out, splits_itself
from kdfast.experiments.common.opening import Speaker, millions, say_data
from kdfast.experiments.distill.config import DistillConfig
from kdfast.training.model_io import ModelConfig
from kdfast.training.telling import SCORES, percent, score_of


def measure_teacher(
    teacher: nn.Module,
    taught: ModelConfig,
    config: DistillConfig,
    test: Labelled | None,
    rank: tuple[int, int],
) -> dict[str, float]:
    """``teacher_accuracy``, or ``teacher_miou``, at the size that it was trained on; nothing without test images.

    Args:
        teacher: Where it runs.
        taught: What feeds it.
        config: The recipe.
        test: The student's test images.
        rank: This process and how many there are.
    """
    if test is None:
        return {}
    if config.image_size not in (None, taught.image_size):
        whole = not splits_itself(config.data, config.test_data)
        test = held_out(config.test_data, taught, config.label_column, task=config.task, whole=whole) or test
    metrics = Evaluator(test, taught, batch_size=256, trainer_rank=rank, workers=config.workers)(
        teacher.eval()
    )
    name = score_of(metrics)
    return {} if name is None else {f"teacher_{name}": metrics[name]}


def share_kept(metrics: Mapping[str, float], known: Mapping[str, float]) -> dict[str, float]:
    """The student's score by the teacher's, as ``share_kept``; nothing where there is none, or it is 0."""
    name = score_of(metrics)
    of_teacher = known.get(f"teacher_{name}", 0.0)
    return {"share_kept": metrics[name] / of_teacher} if name is not None and of_teacher else {}


def say_distillation(
    speaker: Speaker,
    config: DistillConfig,
    batches: Any,
    test: Labelled | None,
    image_size: int,
    networks: Mapping[str, tuple[str, int]],
    known: Mapping[str, float],
) -> None:
    """Data, test images and both networks, the teacher with its score."""
    say_data(speaker, "data", batches, image_size)
    if test is None:
        speaker.say("test", "none; test_data=DIR measures the student")
    else:
        say_data(speaker, "test", test, image_size)
    score = [
        f"{SCORES[name.removeprefix('teacher_')]} {percent(value)} on test" for name, value in known.items()
    ]
    for label, (name, count) in networks.items():
        parts = score if label == "teacher" else [f"method {config.method}"]
        speaker.say(label, name, f"{millions(count)} parameters", *parts)
