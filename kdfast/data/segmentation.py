"""Segmentation folders: images beside PNG masks of class numbers, 255 ignored.

DIR/[train|val|test/]images/NAME.jpg    any format Pillow reads
DIR/[train|val|test/]masks/NAME.png     one channel, a class number a pixel; the same NAME
DIR/classes.txt                         optional: a class name a line
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdfast.data.folders import IMAGE_SUFFIXES
from kdfast.data.labelled import add_files, check_pixels, pillow, reporting_images, rgb_tensor
from kdfast.data.splits import ALIASES, choose, held_out_note, split_name
from kdfast.documents import read_text
from kdfast.errors import DataError

__all__ = ["IGNORE", "SegmentationFolder", "is_segmentation_folder", "open_segmentation"]

IGNORE = 255
_CLASSES = "classes.txt"
_ORIENTATION = 0x0112  # EXIF's
_TEST_SHARE = 5  # without split folders every fifth image is for test


class SegmentationFolder(Dataset[tuple[Tensor, Tensor]]):
    """Images and masks; ``dataset[i]`` is (uint8 RGB ``[3, H, W]``, int64 mask ``[H, W]``).

    Args:
        pairs: Image file by mask file.
        classes: Class names; a mask's number is an index into them.
        source: The folder, for messages.
        image_size: Side in pixels: images are resized and centre-cropped to it (bilinear), masks likewise (nearest).
            None keeps each image's own size.
    """

    def __init__(
        self,
        pairs: Mapping[Path, Path],
        classes: tuple[str, ...],
        source: str,
        image_size: int | None = None,
    ) -> None:
        #: Whether the classes have names, or only the masks' numbers.
        self.named, self.note = True, ""
        #: int64, the number to give for each of a mask's; ``None`` leaves them.
        self.lookup: Tensor | None = None
        pillow("decoding a segmentation folder")  # not kept: modules cannot be sent to a worker process
        self.pairs, self.classes, self.source, self.image_size = (
            list(pairs.items()),
            classes,
            source,
            image_size,
        )

    @property
    def num_classes(self) -> int:
        """How many classes there are, seen or not."""
        return len(self.classes)

    def fingerprint(self) -> str:
        """What tells this data set from any other."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        add_files(digest, [path for pair in self.pairs for path in pair], Path(self.source))
        return digest.hexdigest()[:32]

    def __repr__(self) -> str:
        """Where it is from, how many images and classes."""
        note = f"; {self.note}" if self.note else ""
        return f"SegmentationFolder({self.source!r}: {len(self):,} images, {self.num_classes} classes{note})"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Decode pair ``index``.

        Raises:
            DataError: A file cannot be read, the sizes differ, or the mask holds a class that there is not.
        """
        image_file, mask_file = self.pairs[index]
        library = pillow("decoding a segmentation folder")
        with _open(library, image_file) as image, _open(library, mask_file) as mask:
            if image.size == mask.size:
                image.getexif().pop(_ORIENTATION, None)  # the mask was drawn on the picture as it is stored
            elif _upright_size(image) != mask.size:
                raise DataError(
                    f"mask {mask_file}: is {mask.size}, its image {image_file.name} is {image.size}"
                )
            pixels, labels = (
                rgb_tensor(image, self.image_size),
                _mask_tensor(mask, mask_file, self.image_size),
            )
        count = self.num_classes if self.lookup is None else len(self.lookup)
        wrong = labels[((labels < 0) | (labels >= count)) & (labels != IGNORE)]
        if wrong.numel():
            raise DataError(
                f"mask {mask_file}: holds class {int(wrong.max())}, accepted: 0…{count - 1}, and "
                f"{IGNORE} for pixels that do not count"
            )
        if self.lookup is not None:
            table = torch.full((256,), IGNORE)
            table[: len(self.lookup)] = self.lookup
            labels = table[labels]
        return pixels, labels


def is_segmentation_folder(path: str | Path) -> bool:
    """Whether a folder, or a split of it, holds ``images/`` and ``masks/``."""
    return bool(_split_folders(Path(path)))


def open_segmentation(
    root: str | Path,
    split: str = "train",
    *,
    whole: bool = False,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> SegmentationFolder:
    """A split of a segmentation folder.

    Args:
        root: The folder.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"all"``. Where there are no split folders, every fifth image by
            name is for test, and ``.note`` says so.
        whole: Without split folders, any split is the whole folder.
        image_size: See :class:`SegmentationFolder`.
        num_classes: How many classes there are. None: as many as ``classes.txt`` names, or as the masks of the whole
            folder hold (which reads them all).

    Raises:
        ValueError: ``split`` is another.
        DataError: The folder is missing or not of this form, an image has no mask, or the number of classes differs.
    """
    split = split_name(split)
    root = Path(root)
    folders = _split_folders(root)
    if not folders:
        raise DataError(
            f"{root}: holds no images/ and masks/ folders, neither itself nor in train/ and test/"
        )
    parts = {name: _pairs(folder) for name, folder in folders.items()}
    everything = {image: mask for part in parts.values() for image, mask in part.items()}
    if split == "all" or ("" in parts and whole):
        chosen: dict[Path, Path] | None = dict(sorted(everything.items()))
    elif "" in parts:
        test = dict(list(everything.items())[_TEST_SHARE - 1 :: _TEST_SHARE])
        train = {image: mask for image, mask in everything.items() if image not in test}
        chosen = train if split == "train" else test
    else:
        chosen = parts.get(choose(split, parts) or split)
    if not chosen:
        raise DataError(f"{root}: holds no {split} image")
    classes = _classes(root, everything, num_classes)
    opened = SegmentationFolder(chosen, classes, str(root), image_size)
    opened.named = (root / _CLASSES).exists()
    if "" in parts and len(chosen) < len(everything):
        opened.note = held_out_note(str(root), split, len(chosen), len(everything))
    return opened


def _split_folders(root: Path) -> dict[str, Path]:
    def complete(folder: Path) -> bool:
        return (folder / "images").is_dir() and (folder / "masks").is_dir()

    if complete(root):
        return {"": root}
    below = sorted(entry for entry in root.iterdir() if complete(entry)) if root.is_dir() else []
    found: dict[str, Path] = {}
    for split, spelled in ALIASES.items():
        for alias in spelled:
            named = [folder for folder in below if folder.name.lower() == alias]
            if len(named) > 1:
                raise DataError(
                    f"{root} holds {' and '.join(folder.name for folder in named)}; only one of them can be the "
                    f"{split} split"
                )
            if named:
                found.setdefault(split, named[0])
    return found


def _pairs(folder: Path) -> dict[Path, Path]:
    pairs = {}
    for image in sorted((folder / "images").iterdir()):
        if image.name.startswith(".") or image.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        mask = folder / "masks" / f"{image.stem}.png"
        if not mask.exists():
            raise DataError(f"image {image}: has no mask {mask}")
        pairs[image] = mask
    return pairs


def _classes(root: Path, pairs: Mapping[Path, Path], num_classes: int | None) -> tuple[str, ...]:
    listed = root / _CLASSES
    if listed.exists():
        text = read_text(listed, error=DataError, limit=1 << 20)
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not names or len(set(names)) < len(names):
            raise DataError(f"{listed}: names {len(names)} classes, accepted: at least one, each once")
        if num_classes not in (None, len(names)):
            raise DataError(f"{listed}: names {len(names)} classes, expected {num_classes}")
        return names
    if num_classes is None:
        image = pillow("reading masks")
        highest = -1
        for mask in pairs.values():
            with _open(image, mask) as opened:
                labels = _mask_tensor(opened, mask, None)
            counted = labels[labels != IGNORE]
            highest = max(highest, int(counted.max()) if counted.numel() else -1)
        if highest < 0:
            raise DataError(f"{root}: its masks hold no class at all")
        num_classes = highest + 1
    return tuple(str(number) for number in range(num_classes))


def _open(image: Any, path: Path) -> Any:
    with reporting_images(path):
        opened = image.open(path)
        check_pixels(opened)
        opened.load()
    return opened


def _upright_size(image: Any) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8) else (width, height)


def _mask_tensor(mask: Any, path: Path, image_size: int | None) -> Tensor:
    from PIL import Image, ImageOps

    if mask.mode not in ("L", "P", "1", "I", "I;16"):
        raise DataError(f"mask {path}: has mode {mask.mode}, accepted: one channel of class numbers (L or P)")
    if image_size is not None:
        mask = ImageOps.fit(mask, (image_size, image_size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(mask).astype(np.int64))
