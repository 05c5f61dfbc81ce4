"""Data sets by name: scikit-learn's digits, image folders, 🤗 data sets."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.data.folders import open_folder
from kdfast.data.hub import open_hugging_face
from kdfast.data.labelled import Fit, InMemoryImages, LabelledImages, to_memory
from kdfast.data.splits import SPLITS, split_name
from kdfast.errors import DataError, require

__all__ = ["DIGITS_SIZE", "SPLITS", "InMemoryImages", "LabelledImages", "load_dataset", "to_memory"]

DIGITS_SIZE = 32
_DIGITS_TEST = 360


def load_dataset(
    source: str | Path,
    split: str | None = None,
    *,
    whole: bool = False,
    image_size: int | None = None,
    num_classes: int | None = None,
    label_column: str | None = None,
    crop_pct: float = 1.0,
    interpolation: str = "bilinear",
) -> LabelledImages:
    """A labelled image data set: ``dataset[i]`` is (uint8 RGB ``[3, H, W]``, int label).

    Args:
        source: One of

            - ``"digits"``: scikit-learn's 1797 handwritten digits, which ship with it: 1437 to train on and
              360 to test, drawn once, stratified; in memory, with ``.images`` and ``.labels``;
            - a folder, ``DIR/CLASS/IMAGE`` or ``DIR/{train,val,test}/CLASS/IMAGE``, decoded when asked for;
            - ``"hf:NAME"`` or ``"hf:NAME:CONFIG"``: a 🤗 data set, a local directory or one on the hub.

        split: ``"train"``, ``"val"``, ``"test"`` (each of the latter two stands in for the other where that is missing)
            or ``"all"``; spelled as in :data:`kdfast.data.splits.ALIASES`, in any case. None: the train split, or
            all of a source without splits.
        whole: Of a source without splits, ``"train"`` and ``"test"`` are parts: a fifth of each class, always the
            same, is held out for test, and ``.note`` says so. True: any split is the whole of it, which is what a
            folder to train on beside a folder to test on wants.
        image_size: Side in pixels; larger or smaller images are resized, and centre-cropped to a square.
            None: 32 for digits, each image's own size otherwise.
        num_classes: How many classes there must be; None accepts any number.
        label_column: For ``hf:`` sets with several class columns, which one to use.
        crop_pct: With ``image_size``: resize to ``image_size / crop_pct`` first, and crop the centre out of that, as
            ImageNet is measured (0.875: 256, then 224). Digits are never cropped.
        interpolation: Of that resizing, ``bilinear`` or ``bicubic``.

    Raises:
        ValueError: If ``split`` or ``image_size`` is out of range.
        DataError: If the source is missing, empty, unreadable, or of another number of classes.
        MissingExtraError: If a package that this source needs is not installed.
    """
    whole = whole or split is None
    split = split_name("train" if split is None else split)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size is at least 1, got {image_size}")
    fit = None if image_size is None else Fit(image_size, crop_pct, interpolation)
    name = str(source)
    if label_column is not None and not name.startswith("hf:"):
        raise ValueError(f"label_column is for hf: data sets only; the source is {name!r}")
    dataset: LabelledImages
    if name == "digits":
        dataset = _digits(split, image_size or DIGITS_SIZE)
    elif name.startswith("hf:"):
        dataset = open_hugging_face(name.removeprefix("hf:"), split, fit, label_column, whole=whole)
    elif Path(name).exists():
        dataset = open_folder(Path(name), split, fit, whole=whole)
    else:
        near = difflib.get_close_matches(name.lower(), ["digits"], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f'no data set or folder {name!r}{hint}; accepted are "digits", a folder, "hf:NAME"')
    if num_classes is not None and dataset.num_classes != num_classes:
        raise DataError(f"{name} has {dataset.num_classes} classes, expected {num_classes}")
    return dataset


def _digits(split: str, image_size: int) -> InMemoryImages:
    sklearn_datasets = require("sklearn.datasets", extra="train", feature="the digits data set")
    selection = require("sklearn.model_selection", extra="train", feature="the digits data set")
    bunch = sklearn_datasets.load_digits()
    labels = torch.from_numpy(bunch.target).long()
    images = _digits_to_rgb(torch.from_numpy(bunch.images), image_size)
    if split != "all":
        parts = selection.train_test_split(
            range(len(labels)), test_size=_DIGITS_TEST, random_state=0, stratify=bunch.target
        )
        # Ascending, so that the order is the data set's own and not a library's.
        indices = torch.tensor(sorted(parts[0 if split == "train" else 1]))
        images, labels = images[indices], labels[indices]
    return InMemoryImages(images, labels, tuple("0123456789"), "digits")


def _digits_to_rgb(grey: Tensor, image_size: int) -> Tensor:
    """Grey levels 0..16 of ``[N, 8, 8]`` as uint8 ``[N, 3, image_size, image_size]``, bilinear."""
    levels = grey.float().mul(255.0 / 16.0).unsqueeze(1)
    resized = F.interpolate(levels, size=(image_size, image_size), mode="bilinear", antialias=image_size < 8)
    return resized.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
