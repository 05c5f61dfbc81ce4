"""What pairs are made of: one level each, or as many as a neck has outputs and a shared head has calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdfast.methods.diffkd.config import Pair
from kdfast.models import FeatureTaps
from kdfast.models.layouts import Reading, reading_of
from kdfast.models.maps import Resize, fit
from kdfast.training.supervised import pixels_of

__all__ = ["Level", "find_levels", "pair_names"]


@dataclass(frozen=True)
class Level:
    """One map of the student, and the teacher's that it learns from.

    Attributes:
        name: In logs.
        denoiser: Name of its denoiser, which others may share.
        pair: That it is of.
        at: Which one of the pair's levels.
        count: How many these are.
        student: How the student's activation is read.
        teacher: The same of the teacher's.
    """

    name: str
    denoiser: str
    pair: Pair
    at: int
    count: int
    student: Reading
    teacher: Reading

    def maps(self, own: FeatureTaps, other: FeatureTaps, resize: Resize) -> tuple[Tensor, Tensor]:
        """The level's activations as maps of one size.

        Raises:
            ValueError: The pass had other levels than the one that the method was made with, or the networks ran on
                different batches.
        """
        student = self.student(self._of(own, self.pair.student))
        teacher = self.teacher(self._of(other, _taught(self.pair)))
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"pairs: {student.shape[0]} samples went through the student, {teacher.shape[0]} through the teacher"
            )
        size = (teacher.shape[2], teacher.shape[3])
        return fit(student, size, resize, f"{self.pair.student!r} and {_taught(self.pair)!r}"), teacher

    def _of(self, taps: FeatureTaps, layer: str) -> Tensor:
        found = taps.levels(layer)
        if len(found) != self.count:
            raise ValueError(
                f"pairs: {layer!r} has {len(found)} levels in this pass, and had {self.count} when the method was made"
            )
        return found[self.at]

    def places(self, mask: Tensor | None, teacher: Tensor) -> Tensor | None:
        """How much each place of the level counts, ``[B, 1, H, W]``, by where the objects are; None for all alike.

        Args:
            mask: ``[B, h, w]``, bool or from 0 to 1, in any size of the same picture.
            teacher: The level's map.

        Raises:
            ValueError: There is none and the pair needs one, or it is of another shape.
        """
        if self.pair.background_weight is None:
            return None
        if mask is None:
            raise ValueError(
                f"foreground: got None; pair {self.name!r} has a background_weight, so pass a mask to "
                "loss(foreground=…), or boxes to step"
            )
        if mask.dim() != 3 or len(mask) != len(teacher):
            raise ValueError(
                f"foreground: got shape {tuple(mask.shape)}, accepted: [B, H, W] of {len(teacher)} pictures"
            )
        size = (teacher.shape[2], teacher.shape[3])
        share = fit(mask.to(teacher.device).float()[:, None], size, "student", "the mask")
        return share + self.pair.background_weight * (1 - share)


def _taught(pair: Pair) -> str:
    return pair.teacher or pair.student


def find_levels(
    pairs: Sequence[Pair],
    networks: tuple[nn.Module, nn.Module],
    taps: tuple[FeatureTaps, FeatureTaps],
    images: tuple[Any, Any],
) -> list[Level]:
    """The levels of pairs, by a pass that student and teacher have just made over these images.

    Raises:
        ValueError: Student and teacher have different numbers of levels, or what is in a place is no map.
    """
    found = []
    seen = [pixels_of(batch) if isinstance(batch, Mapping) else batch for batch in images]
    for name, pair in zip(pair_names(pairs), pairs):
        own, other = taps[0].levels(pair.student), taps[1].levels(_taught(pair))
        if len(own) != len(other):
            raise ValueError(
                f"pairs: {pair.student!r} has {len(own)} levels in a pass, the teacher's {_taught(pair)!r} "
                f"{len(other)}; name as many ('NAME:ITEM' of several outputs, 'NAME#CALL' of several calls)"
            )
        for at, (student, teacher) in enumerate(zip(own, other)):
            numbered = name if len(own) == 1 else f"{name}_{at}"
            found.append(
                Level(
                    numbered,
                    numbered if pair.denoiser is None else pair.denoiser.replace(".", "_"),
                    pair,
                    at,
                    len(own),
                    reading_of(
                        networks[0], pair.student, student, pair.student_layout, seen[0], pair.student_tokens
                    ),
                    reading_of(
                        networks[1], _taught(pair), teacher, pair.teacher_layout, seen[1], pair.teacher_tokens
                    ),
                )
            )
    return found


def pair_names(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """One a pair, free of dots (they would part a state dict's keys): its own, its kind, or its kind and layer.

    Raises:
        ValueError: Two have the same.
    """
    kinds = [pair.kind for pair in pairs]
    names = tuple(
        (pair.name or (pair.kind if kinds.count(pair.kind) == 1 else f"{pair.kind}_{pair.student}")).replace(
            ".", "_"
        )
        for pair in pairs
    )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"pairs: {', '.join(repeated)} more than once; give each a name")
    return names
