"""What a recipe of ``kdfast teach`` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import annotated_types as at

from kdfast.experiments.common.bounds import Count
from kdfast.experiments.common.training_recipe import TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class TeachConfig(TrainingRecipe):
    """What to train, on what.

    Attributes:
        data: ``digits``, a folder, or ``hf:NAME``: see :func:`kdfast.data.load_dataset`.
        model: Network to train, by its name for :func:`kdfast.models.create_model`: ``resnet20``, ``wrn_40_2``, …
        image_size: Side of the images in pixels.
        test_data: Where held-out images come from: its test split, or all of a folder without splits. By default
            ``data``, of which a fifth of each class is held out if it has no splits.
        task: ``classification``, or ``segmentation``, for which data are images beside PNG masks.
        num_classes: How many classes the data must have; by default any number.
        label_column: Which class column to use, where an ``hf:`` set has several.
        pretrained: For ``timm:`` and ``hf:`` networks: begin with their weights, and replace the classifier.
        crop_pct: When measured, images are resized to ``image_size`` divided by this, and cropped at the centre; 0.875
            is ImageNet's 256 and 224.
    """

    data: str
    task: Literal["classification", "segmentation"] = "classification"
    model: str = "resnet20"
    image_size: Count = 32
    test_data: str | None = None
    num_classes: Count | None = None
    label_column: str | None = None
    pretrained: bool = False
    crop_pct: Annotated[float, at.Gt(0), at.Le(1)] = 1.0
