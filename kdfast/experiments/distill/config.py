"""What a recipe of ``kdfast distill`` says, whatever its method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdfast.experiments.common.bounds import Count
from kdfast.experiments.common.networks import TeacherKeys
from kdfast.experiments.common.training_recipe import TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainingRecipe, TeacherKeys):
    """Who teaches whom, on which images. The fields of the method's own config stand beside these in a recipe.

    Attributes:
        method: ``dmkd``, ``surrogate``, ``ssdkd``, ``diffkd``, ``kdiffusion``, or a baseline: ``kd``, ``dkd``,
            ``dist``, ``fitnet``, ``at``, ``rkd``.
        teacher: Directory of a trained network, ``timm:NAME``, ``torchvision:NAME`` or ``hf:NAME`` for theirs with its
            weights, or ``FILE.py:FACTORY`` with ``weights``.
        student: Network to train, by its name for :func:`kdfast.models.create_model`: ``resnet8``, ``wrn_16_1``, …
        task: ``classification``, or ``segmentation``, for which data are images beside PNG masks.
        data: What to train on: a directory of shards, or real labelled images (``digits``, a folder, ``hf:NAME``):
            their train split, or all of a folder without splits. Not needed by a method that makes its own.
        test_data: Held-out real images to measure on: ``digits``, a folder, or ``hf:NAME``: their test split, or all of
            a folder without splits (a fifth of each class where ``data`` is the same folder); ``None`` measures
            nothing.
        label_column: Which class column to use, where ``hf:`` data has several.
        labels_from: Where ``kdfast label`` stored the teacher's outputs for ``data``: the student learns from those,
            and the teacher is not loaded. ``labels=stored`` is short for the directory of ``data`` itself.
        data_images: Take only so many: of shards the first ones, so that one large set serves several sizes; of real
            images as many of each class, kept in memory.
        image_size: Side the networks see; by default the teacher's.
        load_size: Side the images are decoded to, before ``augment``; by default ``image_size``.
        loader: ``dali``, or ``torch`` for the plain loader.
        on_error: ``raise`` at a damaged image, or ``skip`` and list it.
    """

    method: str = "dmkd"
    teacher: str
    student: str
    task: Literal["classification", "segmentation"] = "classification"
    data: str | None = None
    test_data: str | None = None
    label_column: str | None = None
    labels_from: str | None = None
    data_images: Count | None = None
    image_size: Count | None = None
    load_size: Count | None = None
    loader: Literal["dali", "torch"] = "dali"
    on_error: Literal["raise", "skip"] = "raise"
