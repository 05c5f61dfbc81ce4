"""What every labelled image data set here is: uint8 RGB tensors beside integer labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdfast.errors import DataError, require

_HELD_OUT = 0.2


class LabelledImages(Dataset[tuple[Tensor, int]], ABC):
    """A data set of images with one class each; ``dataset[i]`` is ``(image, label)``.

    ``image`` is uint8 RGB ``[3, H, W]``; ``label`` an int in ``[0, num_classes)``.

    Attributes:
        source: What the data set was loaded from, for messages.
        classes: Class names; a label is an index into them.
        labels: All labels, int64 ``[N]``, known without decoding an image.
    """

    source: str
    classes: tuple[str, ...]
    labels: Tensor

    @property
    def num_classes(self) -> int:
        """How many classes there are, seen in this split or not."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image ``index`` and its label.

        Raises:
            DataError: If the image cannot be read (the file is named).
        """


class InMemoryImages(LabelledImages):
    """Images held as one tensor.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        labels: int64 ``[N]``.
        classes: Class names.
        source: What to call the data set in messages.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: tuple[str, ...], source: str) -> None:
        self.images, self.labels, self.classes, self.source = images, labels, classes, source

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image ``index`` (a view) and its label."""
        return self.images[index], int(self.labels[index])


def to_memory(dataset: LabelledImages) -> InMemoryImages:
    """Decode every image once and keep them all, for data sets that fit: ``3·H·W`` bytes an image.

    Raises:
        DataError: If the images differ in size, or one cannot be read.
    """
    if isinstance(dataset, InMemoryImages):
        return dataset
    first, _ = dataset[0]
    images = torch.empty(len(dataset), *first.shape, dtype=torch.uint8)
    for index in range(len(dataset)):
        image, _ = dataset[index]
        if image.shape != first.shape:
            raise DataError(
                f"{dataset.source} holds images of different sizes ({tuple(first.shape[1:])} and "
                f"{tuple(image.shape[1:])}); load it with an image_size"
            )
        images[index] = image
    return InMemoryImages(images, dataset.labels, dataset.classes, dataset.source)


def hold_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split a source that has no test split: of each class, a fifth drawn with seed 0 is for test.

    A class of two images or more has at least one in each part; a class of one image is all train.

    Returns:
        Indices of the train and of the test part, int64, ascending.
    """
    rng = np.random.RandomState(0)
    test = np.zeros(len(labels), dtype=bool)
    array = labels.numpy()
    for label in np.unique(array):
        members = np.flatnonzero(array == label)
        count = max(1, round(_HELD_OUT * len(members))) if len(members) > 1 else 0
        test[rng.permutation(members)[:count]] = True
    return torch.from_numpy(np.flatnonzero(~test)), torch.from_numpy(np.flatnonzero(test))


def pillow(feature: str) -> Any:
    """``PIL.Image``, or an error that says which extra brings it."""
    return require("PIL.Image", extra="train", feature=feature)


def rgb_tensor(image: Any, image_size: int | None) -> Tensor:
    """A PIL image as uint8 ``[3, H, W]``; ``image_size`` resizes the shorter side and crops the centre.

    16-bit greys keep their upper 8 bits, palettes and alpha become plain RGB.
    """
    from PIL import Image, ImageOps

    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 and turns such images white.
        image = Image.fromarray((np.asarray(image, dtype=np.int64).clip(0, 65535) // 256).astype(np.uint8))
    image = image.convert("RGB")
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
