"""Image folders: one subfolder a class, decoded when asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast.data.labelled import (
    Fit,
    LabelledImages,
    add_files,
    hold_out,
    pillow,
    reporting_images,
    rgb_tensor,
)
from kdfast.data.splits import ALIASES, choose, held_out_note, is_split
from kdfast.errors import DataError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(LabelledImages):
    """Files and labels of an image folder; use :func:`open_folder` or ``load_dataset`` to make one.

    Args:
        paths: Image files.
        labels: int64 ``[N]``.
        classes: Class names.
        source: The folder, for messages.
        image_size: Side in pixels to resize and centre-crop to; None keeps every image's own size.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        classes: tuple[str, ...],
        source: str,
        image_size: int | Fit | None = None,
    ) -> None:
        pillow("decoding an image folder")  # not kept: modules cannot be sent to a worker process
        self.paths = list(paths)
        self.labels, self.classes, self.source, self.image_size = labels, classes, source, image_size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Decode image ``index``; see :class:`~kdfast.data.labelled.LabelledImages`."""
        path = self.paths[index]
        with reporting_images(path), pillow("decoding an image folder").open(path) as image:
            return rgb_tensor(image, self.image_size), int(self.labels[index])

    def _contents(self, digest: Any) -> None:
        add_files(digest, self.paths, Path(self.source))

    def select(self, indices: Tensor) -> ImageFolder:
        """The data set of these images alone, in this order."""
        paths = [self.paths[i] for i in indices.tolist()]
        return ImageFolder(paths, self.labels[indices], self.classes, self.source, self.image_size)


def open_folder(root: Path, split: str, image_size: int | Fit | None, *, whole: bool = False) -> ImageFolder:
    """A split of a folder of class subfolders.

    Classes are the subfolders' names in alphabetical order; images are found at any depth below them. Where
    ``root`` holds ``train``, ``val`` or ``test`` folders (spelled in any of the ways of
    :data:`kdfast.data.splits.ALIASES`, in any case) of class subfolders, those are the splits, and the classes are
    those of ``train``. Otherwise a fifth of each class is held out for ``val`` and ``test``, or with ``whole``
    nothing is: any split is the whole folder.

    Raises:
        DataError: If the folder is missing, empty, or not of this form.
    """
    if not root.is_dir():
        raise DataError(f"{root} is {'a file, not a folder' if root.exists() else 'no folder'}")
    splits = {name: folder for name in ALIASES if (folder := _split_folder(root, name)) is not None}
    if not splits:
        splits = {"train": root}
    # Split folders may lack images of a class; the one that says what the classes are may not.
    reference = splits.get("train") or next(iter(splits.values()))
    classes = _class_names(reference)
    parts = {
        name: _scan(folder, classes, image_size, complete=folder == reference)
        for name, folder in splits.items()
    }
    if split == "all" or (list(splits) == ["train"] and whole):
        chosen = _concatenate(list(parts.values()), str(root))
    elif list(splits) == ["train"]:
        undivided = parts["train"]
        train, test = hold_out(undivided.labels)
        chosen = undivided.select(train if split == "train" else test)
        chosen.note = held_out_note(str(root), split, len(chosen), len(undivided))
    elif (name := choose(split, parts)) is not None:
        chosen = parts[name]
    else:
        raise DataError(f"{root} holds only a {' and '.join(parts)} split; {split!r} was asked for")
    if not len(chosen):
        raise DataError(f"the {split} split of {root} holds no image")
    return chosen


def _split_folder(root: Path, split: str) -> Path | None:
    found = _subfolders(root)
    for alias in ALIASES[split]:
        # A class may be called "train" (one of CIFAR-100's is): a split holds folders, a class holds images.
        spelled = [name for name in found if name.lower() == alias and _subfolders(root / name)]
        if len(spelled) > 1:
            raise DataError(
                f"{root} holds {' and '.join(spelled)}; only one of them can be the {split} split"
            )
        if spelled:
            return root / spelled[0]
    return None


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _hidden(entry.name))


def _hidden(name: str) -> bool:
    """What file managers and notebooks leave behind: ``.ipynb_checkpoints``, ``._photo.jpg``, ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"


def _class_names(folder: Path) -> tuple[str, ...]:
    names = _subfolders(folder)
    form = f"{folder}/CLASS/IMAGE"
    if names and all(map(is_split, names)):
        # Otherwise train/ and test/ folders of loose images would pass for two classes.
        raise DataError(
            f"{folder / names[0]} holds no class subfolders; the form is {folder / names[0]}/CLASS/IMAGE"
        )
    if len(names) >= 2:
        return tuple(names)
    if names:
        raise DataError(
            f"{folder} has one subfolder, {names[0]!r}; at least two classes are needed, as {form} "
            f"(or did you mean {folder / names[0]}?)"
        )
    if any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in folder.iterdir()):
        raise DataError(f"{folder} holds images but no class subfolders; the form is {form}")
    raise DataError(f"{folder} holds no class subfolders; the form is {form}")


def _scan(
    folder: Path, classes: tuple[str, ...], image_size: int | Fit | None, *, complete: bool
) -> ImageFolder:
    """List the images below each class's folder; ``complete`` refuses a class without any."""
    if unknown := sorted(set(_subfolders(folder)) - set(classes)):
        raise DataError(
            f"{folder} has class {unknown[0]!r}, which is not among the train split's {len(classes)} classes"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _images_below(folder / name)
        if not found and complete:
            raise DataError(f"class folder {folder / name} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        paths += found
        labels += [label] * len(found)
    return ImageFolder(paths, torch.tensor(labels, dtype=torch.int64), classes, str(folder), image_size)


def _images_below(folder: Path) -> list[Path]:
    """Links are followed, as in torchvision and timm, but no folder is read twice: links may go round in circles."""
    found: list[Path] = []
    waiting, visited = [folder] if folder.is_dir() else [], set()
    while waiting:
        here = waiting.pop()
        if (place := os.path.realpath(here)) in visited:
            continue
        visited.add(place)
        with os.scandir(here) as entries:
            for entry in entries:
                if _hidden(entry.name):
                    continue
                if entry.is_dir():
                    waiting.append(Path(entry.path))
                elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                    found.append(Path(entry.path))
    return sorted(found)


def _concatenate(parts: list[ImageFolder], source: str) -> ImageFolder:
    paths = [path for part in parts for path in part.paths]
    labels = torch.cat([part.labels for part in parts])
    return ImageFolder(paths, labels, parts[0].classes, source, parts[0].image_size)
