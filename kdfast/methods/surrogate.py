"""Distillation on surrogate data: images that have nothing to do with the teacher's task ("What Makes a Good Dataset
for Knowledge Distillation?", Frank and Davis).

A batch is augmented hard (Table 5), mixed (mixup, λ ~ U(0, 1) for each image), and may be replaced by pairs of images
on either side of the teacher's decision boundaries (Fig. 3, Table 6). Teacher and student see the same images, and the
student learns the teacher's softened output of them (Eq. 2):

    L = τ² · KL(softmax(t/τ) ‖ softmax(s/τ)),  averaged over the batch;  τ = 2 for general-purpose images, 20 for
                                                fine-grained and synthetic ones

Table 4's other targets, the teacher's class as one-hot vector with or without smoothing, are here to compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.data.augment import mixup
from kdfast.data.boundary import BoundaryPairs, decision_boundary_pairs, random_targets
from kdfast.data.regimes import REGIMES, regime
from kdfast.errors import ConfigError, is_positive
from kdfast.functional import kd_kl_div
from kdfast.models.outputs import logits_of
from kdfast.models.roles import check_networks, chosen_student, still_evaluated
from kdfast.training.learning import Learning

__all__ = ["SurrogateKD", "SurrogateKDConfig"]

Targets = Literal["soft", "one_hot", "label_smoothing"]
Regimes = Literal["none", "standard", "high", "extreme"]
AttackTargets = Literal["random", "stored"]


@dataclass(frozen=True)
class SurrogateKDConfig:
    """What the student sees and what it learns of it.

    Attributes:
        temperature: τ of the soft targets, above 0: 20 for synthetic and fine-grained images, 2 for general-purpose
            ones (Section 4).
        targets: ``"soft"`` the teacher's softened outputs; ``"one_hot"`` its most probable class; ``"label_smoothing"``
            that class, smoothed (Table 4).
        smoothing: Of ``"label_smoothing"``: the share that goes to all classes alike.
        regime: Augmentation before mixup: ``"none"``, ``"standard"``, ``"high"`` or ``"extreme"`` (Table 5).
        mixup: Mix each image with another of its batch.
        attack: Replace the batch by pairs at the teacher's decision boundaries, found after augmentation and mixup.
        attack_targets: Which class an image is pushed to: ``"random"`` another than its own, or ``"stored"`` the label
            beside it, for selected sets, where that is the teacher's class of the image as it was.
        include_original: Keep the attacked images in the batch, beside the pairs.
        deeper: Add each pair's images one step further into their own class.
        epsilon: Largest change of a pixel in [0, 1]. The paper gives neither ε, step nor iterations.
        alpha: First step.
        attack_steps: Of the walk.
        threshold: Highest softmax value that both images of a pair stay below.
    """

    temperature: float = 20.0
    targets: Targets = "soft"
    smoothing: float = 0.1
    regime: Regimes = "high"
    mixup: bool = True
    attack: bool = False
    attack_targets: AttackTargets = "random"
    include_original: bool = False
    deeper: bool = True
    epsilon: float = 8 / 255
    alpha: float = 1 / 255
    attack_steps: int = 20
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not is_positive(self.temperature):
            raise ConfigError(f"temperature: got {self.temperature!r}, accepted: a number above 0, finite")
        for name, accepted in (
            ("targets", get_args(Targets)),
            ("regime", tuple(REGIMES)),
            ("attack_targets", get_args(AttackTargets)),
        ):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, accepted: {', '.join(accepted)}")
        if not 0 < self.smoothing < 1:
            raise ConfigError(f"smoothing: got {self.smoothing}, accepted: a share between 0 and 1")
        for name in ("epsilon", "alpha", "threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepted: above 0, at most 1")
        if self.attack_steps < 1:
            raise ConfigError(f"attack_steps: got {self.attack_steps}, accepted: at least 1")


class SurrogateKD(Learning):
    """The method, as a loss for your own loop or as a whole step.

    Args:
        student: The network that :meth:`step` trains, unless one is given there.
        teacher: In evaluation mode, none of its parameters requiring grad. Needed for :meth:`step` and :meth:`attack`
            only.
        config: What it sees and learns.
        mean: Of each channel, in units of [0, 1]: what both networks' images are normalised by after augmentation.
        std: Likewise. Without either, networks get images in [0, 1].

    Raises:
        ValueError: The teacher requires grad or is in training mode, or the student has nothing to learn; one of mean
            and std without the other.

    Example:
        >>> config = SurrogateKDConfig(attack=True)
        >>> method = SurrogateKD(student, teacher, config=config, mean=mean, std=std)
        >>> for images, labels in loader:  # in [0, 1]
        ...     method.step((images, labels)).backward()
    """

    def __init__(
        self,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        *,
        config: SurrogateKDConfig | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if (mean is None) != (std is None):
            raise ValueError("mean, std: got one of them, accepted: both or neither")
        self.config = config or SurrogateKDConfig()
        check_networks(student, teacher)
        self.student, self.teacher = student, teacher
        self._mean = None if mean is None else torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = None if std is None else torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, student_out: torch.Tensor, teacher_out: torch.Tensor) -> torch.Tensor:
        """The loss of a batch.

        Args:
            student_out: The student's logits ``[B, C]``.
            teacher_out: The teacher's, of the same images ``[B, C]``.

        Returns:
            A 0-d tensor.
        """
        config = self.config
        if config.targets == "soft":
            return kd_kl_div(student_out, teacher_out, config.temperature)
        smoothing = config.smoothing if config.targets == "label_smoothing" else 0.0
        return F.cross_entropy(student_out, teacher_out.argmax(1), label_smoothing=smoothing)

    def augment(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The regime, then mixup.

        Args:
            images: Float ``[B, 3, H, W]`` in [0, 1].
            generator: On their device.

        Returns:
            As many images of the same shape, in [0, 1].
        """
        images = regime(self.config.regime)(images, generator)
        return mixup(images, generator).images if self.config.mixup else images

    def attack(
        self, images: torch.Tensor, labels: torch.Tensor | None, generator: torch.Generator
    ) -> BoundaryPairs:
        """Pairs at the teacher's decision boundaries (:func:`kdfast.data.decision_boundary_pairs`).

        Args:
            images: Float ``[B, 3, H, W]`` in [0, 1], augmented.
            labels: int64 ``[B]``, needed for ``attack_targets="stored"``.
            generator: On their device.

        Raises:
            ValueError: There is no teacher, or there are no labels where they are needed.
        """
        config, teacher = self.config, self._given_teacher()
        if config.attack_targets == "stored":
            if labels is None:
                raise ValueError(
                    "batch: got images alone, accepted: images and labels (attack_targets='stored')"
                )
            targets = labels
        else:
            logits = self._teach(images)
            targets = random_targets(logits.argmax(1), logits.shape[1], generator)
        return decision_boundary_pairs(
            lambda x: logits_of(teacher(self.normalise(x))),
            images,
            targets,
            epsilon=config.epsilon,
            alpha=config.alpha,
            steps=config.attack_steps,
            threshold=config.threshold,
        )

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """From [0, 1] to what the networks take."""
        if self._mean is None or self._std is None:
            return images
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return (images - self._mean.to(images.dtype)) / self._std.to(images.dtype)

    def step(self, batch: Any, student: nn.Module | None = None) -> torch.Tensor:
        """Augmentation, mixup, the attack, the teacher's pass, the student's pass, the loss.

        Random numbers follow from torch's global CPU generator.

        Args:
            batch: Images, float ``[B, 3, H, W]`` in [0, 1] on the networks' device, or a pair of images and int64
                labels ``[B]``.
            student: Instead of the one that the method was made with (say, its distributed wrapper).

        Raises:
            ValueError: There is no student, no teacher or one in training mode, or no labels where they are needed.
            TypeError: A network's output has no logits.
        """
        student_out, teacher_out, _ = self._outputs(batch, student)
        return self(student_out, teacher_out)

    def step_with_parts(
        self, batch: Any, student: nn.Module | None = None
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """:meth:`step`, and what is worth watching beside the loss.

        Returns:
            The loss, and 0-d tensors: ``agreement``, the share of images that both networks put into the same class,
            and with the attack ``attack_success``, the share of images that it found a pair for.
        """
        student_out, teacher_out, parts = self._outputs(batch, student)
        parts["agreement"] = (student_out.detach().argmax(1) == teacher_out.argmax(1)).float().mean()
        return self(student_out, teacher_out), parts

    def _outputs(
        self, batch: Any, student: nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """What both networks say of a batch made ready, and with the attack the share that it found a pair for."""
        images, labels = batch if isinstance(batch, (tuple, list)) else (batch, None)
        student = chosen_student(student, self.student)
        # Seeded from the CPU's generator: resumable with it, and no wait for the device.
        seed = int(torch.randint(2**62, ()))
        generator = torch.Generator(images.device).manual_seed(seed)
        images = self.augment(images, generator)
        parts: dict[str, torch.Tensor] = {}
        if self.config.attack:
            pairs = self.attack(images, labels, generator)
            parts["attack_success"] = pairs.success.float().mean()
            images = self._attacked(images, pairs)
        teacher_out = self._teach(images)
        return logits_of(student(self.normalise(images))), teacher_out, parts

    def _attacked(self, images: torch.Tensor, pairs: BoundaryPairs) -> torch.Tensor:
        if not len(pairs.post) and not self.config.include_original:
            # Nothing crossed: the batch is taught as it is, for every rank must take its step.
            return images
        chosen = [images] if self.config.include_original else []
        chosen += [pairs.post, pairs.pre]
        return torch.cat([*chosen, pairs.deeper] if self.config.deeper else chosen)

    def _teach(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return logits_of(self._given_teacher()(self.normalise(images)))

    def _given_teacher(self) -> nn.Module:
        if self.teacher is None:
            raise ValueError("teacher: got None, accepted: a network, when the method is made")
        return still_evaluated(self.teacher)
