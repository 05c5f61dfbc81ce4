"""🤗 data sets, from a local directory or the hub."""

from __future__ import annotations

import difflib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast.data.labelled import LabelledImages, hold_out, pillow, rgb_tensor
from kdfast.errors import DataError, require

# Where a data set has several class columns (CIFAR-100 has two), the finest one is what papers report.
_LABEL_NAMES = ("label", "labels", "fine_label")
_TEST_NAMES = ("test", "validation", "valid", "val")


class HuggingFaceImages(LabelledImages):
    """A ``datasets.Dataset`` with an image and a label column.

    Args:
        table: The 🤗 data set, its image column not decoded.
        image_column: Name of its image column.
        labels: int64 ``[N]``.
        classes: Class names.
        source: What to call the data set in messages.
        image_size: Side in pixels to resize and centre-crop to; None keeps every image's own size.
    """

    def __init__(
        self,
        table: Any,
        image_column: str,
        labels: Tensor,
        classes: tuple[str, ...],
        source: str,
        image_size: int | None = None,
    ) -> None:
        self._image = pillow("decoding images")
        self.table, self.image_column = table, image_column
        self.labels, self.classes, self.source, self.image_size = labels, classes, source, image_size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Decode image ``index``; see :class:`~kdfast.data.labelled.LabelledImages`."""
        label = int(self.labels[index])
        stored = self.table[index][self.image_column] or {}
        data, path = stored.get("bytes"), stored.get("path")
        where = f"{index} of {self.source}" + (f" ({path})" if path else "")
        if data is None and path is None:
            raise DataError(f"image {where} is missing")
        try:
            with self._image.open(path if data is None else io.BytesIO(data)) as image:
                return rgb_tensor(image, self.image_size), label
        except (OSError, ValueError, SyntaxError, self._image.DecompressionBombError) as error:
            raise DataError(f"cannot read image {where}: {error}") from error


def open_hugging_face(
    name: str, split: str, image_size: int | None, label_column: str | None
) -> HuggingFaceImages:
    """The ``train``, ``test`` or ``all`` split of a 🤗 data set.

    Args:
        name: A directory (written by ``save_to_disk``, or anything ``datasets.load_dataset`` reads), or
            ``NAME`` or ``NAME:CONFIG`` on the hub.
        split: ``test`` is the data set's test split, or its validation split where there is none; with
            neither, a fifth of each class of ``train`` is held out.
        image_size: Side to resize to, or None.
        label_column: Which column holds the labels; None finds it by its type and name.

    Raises:
        DataError: If the data set cannot be loaded, or has no such columns or split.
        MissingExtraError: If the ``datasets`` package is not installed.
    """
    library = require("datasets", extra="hub", feature=f"data set 'hf:{name}'")
    source = f"hf:{name}"
    tables = _tables(library, name)
    first = next(iter(tables.values()))
    image_column = _image_column(library, first, source)
    label_column = _label_column(library, first, source, label_column)
    test_name = next((known for known in _TEST_NAMES if known in tables), None)
    if split == "all":
        names = [known for known in ("train", test_name) if known in tables] or list(tables)
        table = library.concatenate_datasets([tables[known] for known in names])
    elif split == "test" and test_name is not None:
        table = tables[test_name]
    elif "train" in tables:
        table = tables["train"]
        if test_name is None:
            labels, _ = _labels(library, table, label_column, source)
            table = table.select(dict(zip(("train", "test"), hold_out(labels)))[split].tolist())
    else:
        raise DataError(f"{source} has no {split} split; it has {', '.join(tables)}")
    labels, classes = _labels(library, table, label_column, source)
    table = table.select_columns([image_column]).cast_column(image_column, library.Image(decode=False))
    return HuggingFaceImages(table, image_column, labels, classes, f"{source}[{split}]", image_size)


def _tables(library: Any, name: str) -> dict[str, Any]:
    """Every split of the data set, by its own name; a data set without splits is all ``train``."""
    local = Path(name)
    try:
        if any((local / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            loaded = library.load_from_disk(name)
        elif local.exists():
            loaded = library.load_dataset(name)
        else:
            repository, _, config = name.partition(":")
            loaded = library.load_dataset(repository, config or None)
    except Exception as error:
        # The library lets through whatever its readers raise: IndexError for a saved set of no rows, for one.
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(f"cannot load data set 'hf:{name}': {reason}") from error
    tables = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if not any(len(table) for table in tables.values()):
        raise DataError(f"data set 'hf:{name}' is empty")
    return tables


def _image_column(library: Any, table: Any, source: str) -> str:
    columns = [name for name, kind in table.features.items() if isinstance(kind, library.Image)]
    if not columns:
        raise DataError(f"{source} has no image column; its columns are {_describe(table)}")
    return "image" if "image" in columns else str(columns[0])


def _label_column(library: Any, table: Any, source: str, asked: str | None) -> str:
    columns = [
        name
        for name, kind in table.features.items()
        if isinstance(kind, library.ClassLabel)
        or (
            isinstance(kind, library.Value)
            and "int" in kind.dtype
            and (asked == name or name in _LABEL_NAMES)
        )
    ]
    if asked is not None:
        if asked in columns:
            return asked
        near = difflib.get_close_matches(asked, columns, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its columns are {_describe(table)}"
        raise DataError(f"{source} has no label column {asked!r}; {hint}")
    named = [name for name in _LABEL_NAMES if name in columns]
    if named or len(columns) == 1:
        return (named or columns)[0]
    if columns:
        raise DataError(f"{source} has several label columns; choose label_column from {', '.join(columns)}")
    raise DataError(f"{source} has no label column; its columns are {_describe(table)}")


def _labels(library: Any, table: Any, column: str, source: str) -> tuple[Tensor, tuple[str, ...]]:
    values = table[column][:]
    if any(value is None or value < 0 for value in values):
        raise DataError(f"{source} has images without a label in column {column!r}")
    labels = torch.tensor(values, dtype=torch.int64)
    kind = table.features[column]
    if isinstance(kind, library.ClassLabel):
        return labels, tuple(kind.names)
    return labels, tuple(str(label) for label in range(int(labels.max()) + 1 if len(labels) else 0))


def _describe(table: Any) -> str:
    return ", ".join(f"{name} ({type(kind).__name__})" for name, kind in table.features.items())
