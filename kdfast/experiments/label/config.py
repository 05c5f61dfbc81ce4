"""What ``kdfast label`` is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdfast.errors import ConfigError
from kdfast.experiments.common.bounds import Count, Positive
from kdfast.experiments.common.teacher_view import ViewRecipe


@dataclass(frozen=True, kw_only=True)
class LabelConfig(ViewRecipe):
    """What is stored of each image, beside whose outputs they are and of which images.

    Attributes:
        out: Directory of the labels; by default the directory of shards itself.
        views: How many augmented views of each image to label; the student is shown one of them each time.
        augment: What makes a view: ``crop`` (4 pixels of padding), ``flip``. Without it the images are labelled as
            they are.
        top_k: Keep the so many largest outputs of each image, and the mass of the others, which is shared out evenly
            when read; by default all are kept.
        temperature: With ``top_k``: the temperature that the mass of the others is of, best the students'.
        image_size: Side the teacher sees; by default its own.
    """

    out: str | None = None
    views: Count = 1
    augment: tuple[Literal["crop", "flip"], ...] = ()
    top_k: Count | None = None
    temperature: Positive = 1.0
    image_size: Count | None = None

    def __post_init__(self) -> None:
        if self.views > 1 and not self.augment:
            raise ConfigError(
                f"views: got {self.views} without augment, accepted: 1, or augment=[crop,flip], which makes them differ"
            )
        if self.temperature != 1 and self.top_k is None:
            raise ConfigError(
                f"temperature: got {self.temperature:g} without top_k, accepted: 1; all outputs serve every temperature"
            )
