"""What ``kdfast data-report`` is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdfast.errors import ConfigError
from kdfast.experiments.common.bounds import Count
from kdfast.experiments.common.teacher_view import LookRecipe


@dataclass(frozen=True, kw_only=True)
class DataReportConfig(LookRecipe):
    """How closely to look, beside at what.

    Attributes:
        limit: Look at no more than this many images, drawn at random.
        sample: How many of them serve for features, augmentation and duplicates' pictures.
        attacked: How many for the boundaries: each costs 22 passes of the teacher.
        students: Directories of students with two pooled features (``gap2``), to be drawn beside such a teacher
            (Fig. 2).
        test_data: What students are drawn with: ``digits``, a folder, ``hf:NAME``.
        on_error: ``skip`` damaged images and report them, or ``raise``.
    """

    limit: Count = 20_000
    sample: Count = 2000
    attacked: Count = 256
    students: tuple[str, ...] = ()
    test_data: str | None = None
    on_error: Literal["raise", "skip"] = "skip"

    def __post_init__(self) -> None:
        if self.students and self.test_data is None:
            raise ConfigError(
                "test_data: missing; students are drawn with the images that they are tested on"
            )
