"""A student and a teacher in one module, whose step is both passes, the task's loss, and what a method adds to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdfast.models.maps import Shared
from kdfast.models.outputs import logits_of
from kdfast.models.roles import check_networks, still_evaluated
from kdfast.training.learning import Learning
from kdfast.training.mixing import mix_batch, task_loss
from kdfast.training.supervised import (
    asked_for_loss,
    check_sizes,
    foreground_of,
    is_supervised,
    own_loss,
    run,
    transformed,
)

__all__ = ["Foreground", "Taught", "TaughtConfig"]

#: Makes the map of where objects are, for methods that ask for it; None where the batch has no boxes.
Foreground = Callable[[], Tensor] | None


class TaughtConfig(Protocol):
    """What :class:`Taught` reads of a method's config."""

    @property
    def task_weight(self) -> float:
        """Of the cross-entropy with the labels."""

    @property
    def label_smoothing(self) -> float:
        """Of the cross-entropy."""

    @property
    def mixup_alpha(self) -> float | None:
        """α of mixup; None does without."""

    @property
    def cutmix_alpha(self) -> float | None:
        """α of CutMix; None does without."""

    @property
    def ignore_index(self) -> int:
        """Label of pixels that do not count."""


class Taught(Learning, nn.Module):
    """Both networks, and a step over them; a method says in :meth:`distil` what it adds to the task's loss.

    Args:
        student: Any module with something to learn; the only submodule of the two.
        teacher: Any module in evaluation mode whose parameters do not require grad. Copies of this module (a moving
            average of its weights, say) share it, and it is not saved.

    Raises:
        ValueError: The networks are not in these roles; see :mod:`kdfast.models.roles`.
    """

    config: TaughtConfig

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        check_networks(student, teacher)
        self.student = student
        self._teacher = Shared(teacher)
        self.parts: dict[str, Tensor] = {}

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher.value

    def distil(
        self, student_out: Any, teacher_out: Any, *, target: Tensor | None, foreground: Foreground = None
    ) -> Tensor:
        """The method's weighted terms of a batch that both networks just ran on; sets :attr:`parts`.

        Args:
            student_out: Its logits, or what a network returned that computes its task's loss itself.
            teacher_out: What it returned.
            target: Labels, where the task's loss is a cross-entropy with them.
            foreground: Says where the objects of a detector's batch are.
        """
        raise NotImplementedError

    def forward(self, images: Any, target: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Both passes, the task loss and the method's terms.

        Args:
            images: On the networks' device, ``[B, C, H, W]``; a list of images for torchvision's detectors; keywords
                for 🤗 models (``pixel_values``, ``labels`` …) and MMDetection's (``inputs``, ``mode`` …).
            target: int64 labels ``[B]``, or masks ``[B, H, W]`` of a dense student; None leaves the task loss out.
                A list of dicts, as torchvision's detectors take, goes to the student, whose own losses are summed; so
                do the keywords' ``labels``, and ``mode`` ("loss").

        Returns:
            The loss and :attr:`parts`.

        Raises:
            ValueError: The teacher has been put into training mode; two detectors resize images differently; mixing
                was asked for where the student computes its loss.
            TypeError: A network's output has no logits, or no loss where it has to compute it.
        """
        if is_supervised(images, target):
            return self._supervised(images, target)
        config = self.config
        mixed = mix_batch(images, target, mixup=config.mixup_alpha, cutmix=config.cutmix_alpha)
        with torch.no_grad():
            guide = still_evaluated(self.teacher)(mixed.images)
        logits = logits_of(self.student(mixed.images))
        loss = self.distil(logits, guide, target=target)
        if target is not None:
            task = task_loss(
                logits,
                target,
                mixed,
                label_smoothing=config.label_smoothing,
                ignore_index=config.ignore_index,
            )
            self.parts["task"] = task.detach()
            loss = loss + config.task_weight * task
        return loss, dict(self.parts)

    def _supervised(self, images: Any, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`forward` where the student computes its task's loss itself."""
        config = self.config
        if config.mixup_alpha is not None or config.cutmix_alpha is not None:
            raise ValueError(
                "mixup_alpha, cutmix_alpha: the student computes its loss itself, of targets that are not mixed; "
                "accepted: null"
            )
        check_sizes(self.student, self.teacher)
        wanted = asked_for_loss(images)
        with torch.no_grad():
            guide = run(still_evaluated(self.teacher), images)
        with transformed(self.student) as seen:
            output = run(self.student, images, target if wanted is None else wanted)
        loss = self.distil(output, guide, target=None, foreground=lambda: foreground_of(images, seen))
        if target is not None or wanted is not None:
            task = own_loss(output)
            self.parts["task"] = task.detach()
            loss = loss + config.task_weight * task
        return loss, dict(self.parts)

    def step(self, batch: Any) -> Tensor:
        """:meth:`forward` of images, of a pair of images and targets, or of a batch of keywords; the loss alone."""
        images, target = batch if isinstance(batch, (tuple, list)) else (batch, None)
        loss: Tensor = self(images, target)[0]
        return loss
