"""What a run says of itself while it trains: loss from the first step, epoch and accuracy as they come."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kdfast.training.place import Place
from kdfast.training.progress import Progress, Task

#: What an evaluation is judged by, the first that it has, and what that is called in a line.
SCORES = {"accuracy": "accuracy", "miou": "mIoU"}


def score_of(metrics: Mapping[str, float]) -> str | None:
    """The name of the metric that says how good a network is; ``None`` where no metric does."""
    return next((name for name in SCORES if name in metrics), None)


def percent(share: float) -> str:
    """``0.8512`` as ``85.1 %``."""
    return f"{100 * share:.1f} %"


class Teller:
    """The lines and the bar's note of one run; says nothing where progress is off.

    Args:
        progress: Where to say it.
        task: The bar, over all steps.
        epochs: How many there will be; 0 where steps are counted instead.
    """

    def __init__(self, progress: Progress, task: Task, epochs: int) -> None:
        self._progress, self._task, self._epochs = progress, task, epochs
        self._loss: float | None = None
        self._score = ""
        self._sum: torch.Tensor | None = None
        self._steps = 0

    def step(self, place: Place, loss: torch.Tensor, mean: float | None) -> None:
        """Count a step: its loss on the device, and the log's mean where one was just taken."""
        if mean is not None:
            self._loss = mean
        elif self._loss is None and self._progress.enabled:
            self._loss = float(loss)  # waits for the device, once a run
        if self._progress.enabled:
            self._sum = loss if self._sum is None else self._sum + loss
            self._steps += 1
        loss_now = "" if self._loss is None else f"loss {self._loss:.4g}"
        parts = (self._epoch(place.epoch + 1), loss_now, self._score)
        self._task.advance(note=" · ".join(part for part in parts if part))

    def epoch(self, place: Place, metrics: Mapping[str, float], *, last: bool) -> None:
        """Say how an epoch ended: mean loss, score, the best one so far, time left."""
        if not self._progress.enabled:
            return
        total, steps, self._sum, self._steps = self._sum, self._steps, None, 0
        if total is not None and steps:
            self._loss = float(total) / steps
        parts = [self._epoch(place.epoch), f"loss {self._loss:.4g}" if self._loss is not None else ""]
        if (name := score_of(metrics)) is not None:
            best, when = place.metrics.get(f"best_{name}"), place.metrics.get("best_epoch")
            score = f"{SCORES[name]} {percent(metrics[name])}"
            self._score = score.replace("accuracy", "acc")  # the bar is narrow
            known = (
                "" if best is None or when == place.epoch else f" (best {percent(best)}, epoch {when:.0f})"
            )
            parts.append(score + known)
        parts.append("" if last or not self._task.left else f"{self._task.left} left")
        line = " · ".join(part for part in parts if part)
        self._progress.say(line, always=last or place.epoch == 1)

    def _epoch(self, number: int) -> str:
        return f"epoch {number}/{self._epochs}" if self._epochs else f"epoch {number}"
