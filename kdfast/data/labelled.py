"""What every labelled image data set here is: uint8 RGB tensors beside integer labels."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdfast.data.headers import MAX_PIXELS
from kdfast.errors import DataError, require

_HELD_OUT = 0.2
_READ_WHOLE = 256 << 20  # bytes of a folder up to which its files are looked into
# What Pillow and its plugins raise on damaged files: SyntaxError for broken PNG chunks, the last ones for short files.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, zlib.error, struct.error, EOFError),
    *(IndexError, KeyError, TypeError, AttributeError, OverflowError, NotImplementedError, MemoryError),
)


class LabelledImages(Dataset[tuple[Tensor, int]], ABC):
    """A data set of images with one class each; ``dataset[i]`` is ``(image, label)``.

    ``image`` is uint8 RGB ``[3, H, W]``; ``label`` an int in ``[0, num_classes)``.

    Attributes:
        source: What the data set was loaded from, for messages.
        classes: Class names; a label is an index into them.
        labels: All labels, int64 ``[N]``, known without decoding an image.
        named: Whether ``classes`` are names; else they are numbers that nobody named.
        note: What a user should know about how the set came to be, such as that a part was held out; or empty.
    """

    source: str
    classes: tuple[str, ...]
    labels: Tensor
    #: Whether the classes have names, or only numbers that stand for them.
    named: bool = True
    note: str = ""

    @property
    def num_classes(self) -> int:
        """How many classes there are, seen in this split or not."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        """Where it is from, how many images and which classes."""
        names = ", ".join(self.classes[:4]) + (", …" if len(self.classes) > 4 else "")
        held = f"{len(self):,} images, {self.num_classes} classes: {names}" + (
            f"; {self.note}" if self.note else ""
        )
        return f"{type(self).__name__}({self.source!r}: {held})"

    def fingerprint(self) -> str:
        """What tells this data set from any other, so that results of one are not taken for the other's."""
        digest = hashlib.sha256("\0".join((type(self).__name__, *self.classes)).encode("utf-8", "replace"))
        digest.update(self.labels.numpy().tobytes())
        self._contents(digest)
        return digest.hexdigest()[:32]

    def contents(self) -> str:
        """What tells its images, in their order, from any others, whatever their labels and classes are called."""
        digest = hashlib.sha256(f"{type(self).__name__}\0{len(self)}\0".encode())
        self._contents(digest)
        return digest.hexdigest()[:32]

    def _contents(self, digest: Any) -> None:
        """Add what is in the images, or what stands for it."""

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

    def _contents(self, digest: Any) -> None:
        digest.update(self.images.contiguous().numpy().data)

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
    kept = InMemoryImages(images, dataset.labels, dataset.classes, dataset.source)
    kept.named, kept.note = dataset.named, dataset.note
    return kept


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


def add_files(digest: Any, files: Sequence[Path], root: Path) -> None:
    """Names and sizes of files, and what is in them as far as that is read in a second or two.

    Neither times nor the folder's own place: a set that was copied is the same set.
    """
    sizes = [os.stat(path).st_size for path in files]
    whole = sum(sizes) <= _READ_WHOLE
    for path, size in zip(files, sizes):
        digest.update(f"{os.path.relpath(path, root)}\0{size}\0".encode("utf-8", "surrogateescape"))
        if whole:
            digest.update(path.read_bytes())


def pillow(feature: str) -> Any:
    """``PIL.Image``, or an error that says which extra brings it."""
    return require("PIL.Image", extra="train", feature=feature)


@contextmanager
def reporting_images(where: str | Path) -> Iterator[None]:
    """Turn whatever Pillow raises on a damaged or oversized file into a :class:`DataError` that names it."""
    from PIL import Image

    try:
        yield
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {where}: {error or type(error).__name__}") from error


def check_pixels(image: Any) -> None:
    """Look at an opened image's size before it is decoded.

    Raises:
        ValueError: It claims more than :data:`~kdfast.data.headers.MAX_PIXELS`.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"it claims {width}x{height} pixels, accepted: at most {MAX_PIXELS}")


@dataclass(frozen=True)
class Fit:
    """How an image becomes a square: the shorter side resized to ``side / crop_pct``, and the centre cropped.

    Attributes:
        side: Of the square, in pixels.
        crop_pct: Share of the resized side that is kept; 0.875 is the usual 256 and 224 of ImageNet.
        interpolation: ``bilinear`` or ``bicubic``.
    """

    side: int
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct: got {self.crop_pct}; accepted: above 0, at most 1")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation: got {self.interpolation!r}; accepted: bilinear, bicubic")

    def __call__(self, image: Any) -> Any:
        """A PIL image, square; rounded as torchvision's Resize and CenterCrop round."""
        from PIL import Image, ImageOps

        resample = getattr(Image.Resampling, self.interpolation.upper())
        if self.crop_pct == 1:
            return ImageOps.fit(image, (self.side, self.side), resample)
        short = math.floor(self.side / self.crop_pct)
        width, height = image.size
        scaled = (
            (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        )
        image = image.resize(scaled, resample)
        left, top = (round((extent - self.side) / 2.0) for extent in scaled)
        return image.crop((left, top, left + self.side, top + self.side))


def rgb_tensor(image: Any, image_size: int | Fit | None) -> Tensor:
    """A PIL image as uint8 ``[3, H, W]``, upright; ``image_size`` resizes the shorter side and crops the centre.

    16-bit greys keep their upper 8 bits, floats from 0 to 1 are spread over 0 to 255, palettes and alpha become plain
    RGB. A turn that EXIF asks for is taken, as in shards.

    Raises:
        ValueError: Too many pixels, or numbers of which nobody can say what is white.
    """
    from PIL import Image, ImageOps

    check_pixels(image)
    kind = image.format
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                "it has floating-point pixels outside of 0 to 1; save it with 8 or 16 bits a channel"
            )
        image = Image.fromarray((255 * values).round().astype(np.uint8))
    elif image.mode == "I" and kind == "TIFF":
        raise ValueError("it has 32 bits a channel; accepted: 8 or 16, or floats from 0 to 1")
    elif image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 and turns such images white.
        image = Image.fromarray((np.asarray(image, dtype=np.int64).clip(0, 65535) // 256).astype(np.uint8))
    image = image.convert("RGB")
    if image_size is not None:
        image = (image_size if isinstance(image_size, Fit) else Fit(image_size))(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
