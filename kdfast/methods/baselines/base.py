"""What the baselines have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from kdfast.errors import ConfigError
from kdfast.models import FeatureTaps
from kdfast.models.layouts import Reading, reading_of
from kdfast.models.maps import Layout, Shared, last_feature, probe_images
from kdfast.models.modes import evaluated
from kdfast.models.outputs import logits_of
from kdfast.training.learning import OWN
from kdfast.training.supervised import run
from kdfast.training.taught import Foreground, Taught

__all__ = ["Baseline", "BaselineConfig", "FeatureBaseline", "FeatureConfig"]


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """The fields of every baseline.

    Attributes:
        task_weight: Of the cross-entropy with the labels.
        label_smoothing: Of the cross-entropy.
        mixup_alpha: Mix images by λ ~ Beta(α, α), one a batch; ``None`` does not.
        cutmix_alpha: The same with boxes; with both, each batch is mixed in one of the two ways.
        ignore_index: Label of pixels that do not count.
    """

    task_weight: float = 1.0
    label_smoothing: float = 0.0
    mixup_alpha: float | None = None
    cutmix_alpha: float | None = None
    ignore_index: int = 255

    #: Fields that must be above 0; all other numbers must be at least 0.
    positive: ClassVar[tuple[str, ...]] = ("temperature",)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            above = name in self.positive or name.endswith("_alpha")
            if not math.isfinite(value) or value < 0 or (above and value == 0):
                accepted = "a number above 0" if above else "a finite number of at least 0"
                raise ConfigError(f"{name}: got {value}, accepted: {accepted}")
        if self.label_smoothing >= 1:
            raise ConfigError(f"label_smoothing: got {self.label_smoothing}, accepted: from 0 to below 1")


C = TypeVar("C", bound=BaselineConfig)
F = TypeVar("F", bound="FeatureConfig")


class Baseline(Taught, Generic[C]):
    """A student, a frozen teacher, and one term between them.

    Args:
        student: Any module; its logits are what it returns.
        teacher: Any module in evaluation mode whose parameters do not require grad.
        config: Fields of the method; by default the paper's.
        images: Some inputs ``[B, …]`` for both networks, on their device; only methods with layers of their own look,
            for the features' shapes.

    Attributes:
        parts: Of the last loss, detached 0-d tensors: ``task`` and ``kd``.

    Example:
        >>> method = KD(student, teacher.eval().requires_grad_(False))
        >>> optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
        >>> method.step((images, labels)).backward()

    Raises:
        ValueError: The teacher requires grad or is in training mode, the student has nothing to learn, or a layer does
            not exist.
    """

    CONFIG: type[C]
    config: C

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        config: C | None = None,
        images: Tensor | None = None,
    ) -> None:
        super().__init__(student, teacher)
        self.config = config or self.CONFIG()
        self.prepare(images)

    def prepare(self, images: Tensor | None) -> None:
        """Make what the method has of its own."""

    def term(self, student: Tensor, teacher: Tensor, *, target: Tensor | None) -> Tensor:
        """The method's term, weighted, of the logits (and of features that both networks just computed)."""
        raise NotImplementedError

    @property
    def reads_logits(self) -> bool:
        """Whether the term is of logits; features alone need none, and detectors have none."""
        return True

    def distil(
        self, student_out: Any, teacher_out: Any, *, target: Tensor | None, foreground: Foreground = None
    ) -> Tensor:
        """:meth:`term` of both networks' logits; where objects are counts for nothing here."""
        if self.training:
            self._watch(self.student.parameters(), {OWN: self.own_parameters()})
        if self.reads_logits:
            own, other = logits_of(student_out), logits_of(teacher_out)
        else:
            own = other = next(self.student.parameters()).new_zeros(())
        loss = self.term(own, other, target=target)
        self.parts = {"kd": loss.detach()}
        return loss

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """The method's, without the student's."""
        return (p for name, p in self.named_parameters() if not name.startswith("student."))


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(BaselineConfig):
    """The fields of baselines that look at features.

    Attributes:
        student_layers: The student's, by name; by default the last map before pooling.
        teacher_layers: The teacher's, as many.
        student_layout: Of 4-d activations: ``auto``, ``channels_first`` or ``channels_last``.
        teacher_layout: The same for the teacher.
    """

    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    student_layout: Layout = "auto"
    teacher_layout: Layout = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            len(self.student_layers) != len(self.teacher_layers)
            and self.student_layers
            and self.teacher_layers
        ):
            raise ConfigError(
                f"teacher_layers: got {len(self.teacher_layers)}, accepted: as many as student_layers, "
                f"{len(self.student_layers)}"
            )


class FeatureBaseline(Baseline[F]):
    """A baseline with taps on both networks."""

    @property
    def reads_logits(self) -> bool:
        """No."""
        return False

    def prepare(self, images: Tensor | None) -> None:
        """Set the taps."""
        own = self.config.student_layers or (last_feature(self.student, "student_layers"),)
        other = self.config.teacher_layers or (last_feature(self.teacher, "teacher_layers"),)
        if len(own) != len(other):
            raise ValueError(
                f"teacher_layers: got {len(other)}; as many as student_layers, {len(own)}, are needed"
            )
        self._readings: dict[tuple[bool, str], Reading] = {}
        self._taps = FeatureTaps(self.student, own, every_call=True)
        self._teacher_taps = Shared(FeatureTaps(self.teacher, other, detach=True, every_call=True))

    def features(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of maps ``[B, C, H, W]`` that both networks just computed; they are forgotten here."""
        config = self.config
        student = self._maps(self.student, self._taps, config.student_layout)
        teacher = self._maps(self.teacher, self._teacher_taps.value, config.teacher_layout)
        self._taps.clear()
        self._teacher_taps.value.clear()
        if len(student) != len(teacher):
            raise ValueError(
                f"student_layers: have {len(student)} levels, teacher_layers {len(teacher)}; as many are needed (say "
                "which with ':ITEM' or '#CALL')"
            )
        return list(zip(student, teacher))

    def _maps(self, network: nn.Module, taps: FeatureTaps, layout: Layout) -> list[Tensor]:
        found = []
        for name in taps:
            for x in taps.levels(name):
                # By the first batch; what it says does not change.
                key = (network is self.student, name)
                if key not in self._readings:
                    self._readings[key] = reading_of(network, name, x, layout)
                found.append(self._readings[key](x))
        return found

    @torch.no_grad()
    def probe(self, images: Any) -> Sequence[tuple[Tensor, Tensor]]:
        """The features of some images, in evaluation mode, for their shapes."""
        with evaluated(self.student):
            run(self.student, probe_images(self.student) if images is None else images)
        run(self.teacher, probe_images(self.teacher) if images is None else images)
        return self.features()

    def close(self) -> None:
        """Take the taps off both networks."""
        self._taps.close()
        self._teacher_taps.value.close()
