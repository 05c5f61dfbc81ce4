"""DM-KD: distil on images that a diffusion model made ("Is Synthetic Data From Diffusion Models Ready for Knowledge
Distillation?", Li et al. 2023).

The student learns the teacher's softened outputs on synthetic images and nothing else:

    L = τ² · KL(softmax(t/τ) ‖ softmax(s/τ)),  averaged over the batch, τ = 10

The labels that the images were made for are of no use, and do harm (Table 10): ``labels="hard"`` and ``"both"`` are
here to see that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.data.augment import cutmix
from kdfast.errors import ConfigError, is_positive
from kdfast.functional import kd_kl_div
from kdfast.models.outputs import logits_of
from kdfast.models.roles import check_networks, chosen_student, still_evaluated
from kdfast.training.learning import Learning

__all__ = ["DMKD", "DMKDConfig"]

Labels = Literal["soft", "hard", "both"]
HardLabels = Literal["stored", "teacher"]


@dataclass(frozen=True)
class DMKDConfig:
    """What the student learns from.

    Attributes:
        temperature: τ, above 0. The paper's best is 10 (Fig. 6).
        labels: ``"soft"`` the teacher's outputs, ``"hard"`` class labels by cross-entropy, ``"both"`` their sum, 1:1
            (Table 10).
        hard_labels: Which class labels: ``"stored"`` beside the image, the class it was made for, as in the paper;
            ``"teacher"`` its most probable class for the image.
        cutmix_alpha: Mix boxes of images, λ ~ Beta(α, α), one box a batch; teacher and student both see the mixed
            image. ``None`` leaves images alone.
    """

    temperature: float = 10.0
    labels: Labels = "soft"
    hard_labels: HardLabels = "stored"
    cutmix_alpha: float | None = 0.25

    def __post_init__(self) -> None:
        if not is_positive(self.temperature):
            raise ConfigError(f"temperature: got {self.temperature!r}, accepted: a number above 0, finite")
        if self.labels not in get_args(Labels):
            raise ConfigError(f"labels: got {self.labels!r}, accepted: {', '.join(get_args(Labels))}")
        if self.hard_labels not in get_args(HardLabels):
            raise ConfigError(
                f"hard_labels: got {self.hard_labels!r}, accepted: {', '.join(get_args(HardLabels))}"
            )
        if self.cutmix_alpha is not None and not is_positive(self.cutmix_alpha):
            raise ConfigError(
                f"cutmix_alpha: got {self.cutmix_alpha!r}, accepted: a number above 0, or null for none"
            )


class DMKD(Learning):
    """The method, as a loss for your own loop or as a whole step.

    Args:
        student: The network that :meth:`step` trains, unless one is given there.
        teacher: In evaluation mode, none of its parameters requiring grad. Needed for :meth:`step` only.
        config: What to learn from.

    Raises:
        ValueError: The teacher requires grad or is in training mode, or the student has nothing to learn.

    Example:
        In a loop that already has both outputs:

        >>> method = DMKD(config=DMKDConfig(temperature=4.0))
        >>> loss = method(student(images), teacher_logits)

        Or with CutMix and the teacher's pass left to the method:

        >>> method = DMKD(student, teacher.eval().requires_grad_(False))
        >>> for batch in loader:
        ...     method.step(batch).backward()
    """

    def __init__(
        self,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        *,
        config: DMKDConfig | None = None,
    ) -> None:
        self.config = config or DMKDConfig()
        check_networks(student, teacher)
        self.student, self.teacher = student, teacher

    def __call__(
        self,
        student_out: torch.Tensor,
        teacher_out: torch.Tensor | None = None,
        *,
        target: torch.Tensor | None = None,
        mixed_target: torch.Tensor | None = None,
        lam: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """The loss of a batch.

        Args:
            student_out: The student's logits ``[B, C]``, or ``[B, C, H, W]`` of pixels.
            teacher_out: The teacher's, of the same shape; not needed for stored hard labels alone.
            target: int64 ``[B]``, the stored class labels; needed for those only.
            mixed_target: int64 ``[B]``, the labels of what was mixed in.
            lam: Share of the image that ``target`` stands for, a number or ``[B]``; with ``mixed_target``.

        Returns:
            A 0-d tensor.

        Raises:
            ValueError: An argument that these labels need is missing.
        """
        config = self.config
        loss = student_out.new_zeros((), dtype=torch.float32)
        if config.labels != "hard":
            taught = _given(teacher_out, "teacher_out", config)
            # Over rows: the batch, or of segmentation logits every pixel.
            loss = kd_kl_div(student_out, taught, config.temperature, dim=1, reduction="rowmean")
        if config.labels == "soft":
            return loss
        if config.hard_labels == "teacher":
            # The mixed image's own most probable class, so there is nothing to mix.
            return loss + F.cross_entropy(student_out, _given(teacher_out, "teacher_out", config).argmax(1))
        target = _given(target, "target", config)
        if mixed_target is None:
            return loss + F.cross_entropy(student_out, target)
        if lam is None:
            raise ValueError(
                "lam: got None, accepted: the share of target in the mix (mixed_target is given)"
            )
        own = F.cross_entropy(student_out, target, reduction="none")
        other = F.cross_entropy(student_out, mixed_target, reduction="none")
        return loss + (lam * own + (1 - lam) * other).mean()

    def step(self, batch: Any, student: nn.Module | None = None) -> torch.Tensor:
        """CutMix, the teacher's pass, the student's pass, the loss.

        Random numbers follow from torch's global CPU generator.

        Args:
            batch: Images, float ``[B, C, H, W]`` on the networks' device, or a pair of images and int64 labels ``[B]``.
            student: Instead of the one that the method was made with (say, its distributed wrapper).

        Raises:
            ValueError: There is no student, no teacher where one is needed, or one in training mode.
            TypeError: A network's output has no logits.
        """
        images, target = batch if isinstance(batch, (tuple, list)) else (batch, None)
        student = chosen_student(student, self.student)
        partner, lam = None, None
        if self.config.cutmix_alpha is not None:
            # Seeded from the CPU's generator: resumable with it, and no wait for the device.
            seed = int(torch.randint(2**62, ()))
            generator = torch.Generator(images.device).manual_seed(seed)
            images, partner, lam = cutmix(images, generator, alpha=self.config.cutmix_alpha, one_box=True)
        mixed_target = target[partner] if target is not None and partner is not None else None
        # The teacher first: what it computes is gone when the student begins to keep activations for backward, which
        # then are still in the cache.
        taught = self._teach(images)
        return self(logits_of(student(images)), taught, target=target, mixed_target=mixed_target, lam=lam)

    def _teach(self, images: torch.Tensor) -> torch.Tensor | None:
        if self.config.labels == "hard" and self.config.hard_labels == "stored":
            return None
        if self.teacher is None:
            raise ValueError("teacher: got None, accepted: a network, when the method is made")
        with torch.no_grad():
            return logits_of(still_evaluated(self.teacher)(images))


def _given(value: torch.Tensor | None, name: str, config: DMKDConfig) -> torch.Tensor:
    if value is None:
        raise ValueError(
            f"{name}: got None, accepted: a tensor (labels={config.labels!r}, {config.hard_labels} ones)"
        )
    return value
