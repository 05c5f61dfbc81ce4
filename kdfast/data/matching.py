"""Labels of one data set in the order of another's classes: by name, never by number alone where there are names."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from kdfast.data.labelled import LabelledImages
from kdfast.data.manifest import is_shard_folder, read_manifest
from kdfast.data.naming import class_mapping
from kdfast.data.segmentation import SegmentationFolder
from kdfast.errors import DataError

D = TypeVar("D", LabelledImages, SegmentationFolder)


def match_classes(dataset: D, classes: Sequence[str], num_classes: int) -> D:
    """The same images with labels that count the network's classes.

    Args:
        dataset: Labelled images, or images with masks.
        classes: Names of the network's classes by number; empty if it has none.
        num_classes: How many classes it has.

    Returns:
        A copy whose labels are numbers in ``classes``. Where either side has no names, numbers are taken as they are.

    Raises:
        DataError: An image is of a class that the network does not have; both lists are shown.
    """
    named = dataset.named and len(classes) == num_classes
    used = _used(dataset)
    if not named:
        if used and max(used) >= num_classes:
            raise DataError(
                f"{dataset.source}: has {max(used) + 1} classes, expected {num_classes}, the network's, which go by "
                "number because there are no names"
            )
        return dataset
    if tuple(dataset.classes) == tuple(classes):
        return dataset
    mapping = class_mapping(dataset.classes, classes, used, str(dataset.source))
    matched = copy.copy(dataset)
    matched.classes = tuple(classes)
    if isinstance(matched, SegmentationFolder):
        matched.lookup = torch.from_numpy(mapping)
    else:
        matched.labels = torch.from_numpy(mapping)[dataset.labels]
    return matched


def shard_class_names(data: str | Path) -> tuple[str, ...]:
    """The names that a set of shards gives its classes; empty if it gives none."""
    if not is_shard_folder(data):
        return ()
    manifest = read_manifest(data)
    names = manifest.metadata.get("classes")
    # Whoever wrote the set may have meant something else by the word.
    if (
        isinstance(names, list)
        and len(names) == manifest.num_classes
        and all(isinstance(n, str) for n in names)
    ):
        return tuple(names)
    return ()


def _used(dataset: LabelledImages | SegmentationFolder) -> set[int]:
    if isinstance(dataset, SegmentationFolder):
        return set(range(dataset.num_classes))
    return set(dataset.labels.tolist())
