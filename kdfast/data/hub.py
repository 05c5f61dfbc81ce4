"""🤗 data sets, from a local directory or the hub."""

from __future__ import annotations

import difflib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast.data.labelled import Fit, LabelledImages, hold_out, pillow, reporting_images, rgb_tensor
from kdfast.data.naming import class_mapping
from kdfast.data.splits import choose, held_out_note, is_split, split_name
from kdfast.errors import DataError, require

# Where a data set has several class columns (CIFAR-100 has two), the finest one is what papers report.
_LABEL_NAMES = ("label", "labels", "fine_label")
# A label beyond is a slip (an identifier taken for a class), and a network of so many classes fits nowhere.
_MOST_CLASSES = 1 << 20


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
        image_size: int | Fit | None = None,
    ) -> None:
        pillow("decoding images")  # not kept: modules cannot be sent to a worker process
        self.table, self.image_column = table, image_column
        self.labels, self.classes, self.source, self.image_size = labels, classes, source, image_size

    def _contents(self, digest: Any) -> None:
        # The library's own, of the rows and of what was done to them.
        digest.update(str(getattr(self.table, "_fingerprint", "")).encode())

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Decode image ``index``; see :class:`~kdfast.data.labelled.LabelledImages`."""
        label = int(self.labels[index])
        stored = self.table[index][self.image_column] or {}
        data, path = stored.get("bytes"), stored.get("path")
        where = f"{index} of {self.source}" + (f" ({path})" if path else "")
        if data is None and path is None:
            raise DataError(f"image {where} is missing")
        with (
            reporting_images(where),
            pillow("decoding images").open(path if data is None else io.BytesIO(data)) as image,
        ):
            return rgb_tensor(image, self.image_size), label


def open_hugging_face(
    name: str, split: str, image_size: int | Fit | None, label_column: str | None, *, whole: bool = False
) -> HuggingFaceImages:
    """A split of a 🤗 data set.

    Args:
        name: A directory (written by ``save_to_disk``, or anything ``datasets.load_dataset`` reads), or
            ``NAME`` or ``NAME:CONFIG`` on the hub.
        split: ``train``, ``val``, ``test`` or ``all``. A validation split stands in for a missing test split and the
            reverse; with neither, a fifth of each class of ``train`` is held out.
        image_size: Side to resize to, or None.
        label_column: Which column holds the labels; None finds it by its type and name.
        whole: Hold nothing out; ``train`` alone answers every split.

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
    parts: dict[str, Any] = {}
    for known, table in tables.items():
        if is_split(known):
            parts.setdefault(split_name(known), table)
    note = ""
    if split == "all":
        chosen = list(parts.values()) or list(tables.values())
    elif list(parts) == ["train"]:
        table = parts["train"]
        if not whole:
            train, test = hold_out(_labels(table, label_column, source))
            table = table.select((train if split == "train" else test).tolist())
            note = held_out_note(source, split, len(table), len(parts["train"]))
        chosen = [table]
    elif (found := choose(split, parts)) is not None:
        chosen = [parts[found]]
    else:
        raise DataError(f"{source} has no {split} split; it has {', '.join(tables)}")
    classes, named = _classes(library, tables, label_column, source)
    labels = torch.cat([_numbered(library, table, label_column, source, classes, named) for table in chosen])
    pictures = [
        table.select_columns([image_column]).cast_column(image_column, library.Image(decode=False))
        for table in chosen
    ]
    table = pictures[0] if len(pictures) == 1 else library.concatenate_datasets(pictures)
    dataset = HuggingFaceImages(table, image_column, labels, classes, f"{source}[{split}]", image_size)
    dataset.named, dataset.note = named, note
    return dataset


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


def _labels(table: Any, column: str, source: str) -> Tensor:
    values = table[column][:]
    if any(value is None or value < 0 for value in values):
        raise DataError(f"{source} has images without a label in column {column!r}")
    if values and max(values) >= _MOST_CLASSES:
        raise DataError(
            f"{source} has label {max(values)} in column {column!r}, accepted: below {_MOST_CLASSES}"
        )
    return torch.tensor(values, dtype=torch.int64)


def _classes(library: Any, tables: dict[str, Any], column: str, source: str) -> tuple[tuple[str, ...], bool]:
    """The classes of all splits as the train split (or the first) numbers them, and whether they have names."""
    ordered = sorted(tables, key=lambda name: name != "train")
    kinds = [tables[name].features.get(column) for name in ordered]
    if isinstance(kinds[0], library.ClassLabel):
        return tuple(kinds[0].names), True
    # Numbers: a test split may lack the highest one.
    columns = [_labels(table, column, source) for table in tables.values() if column in table.features]
    count = max((int(labels.max()) + 1 for labels in columns if len(labels)), default=0)
    return tuple(str(label) for label in range(count)), False


def _numbered(
    library: Any, table: Any, column: str, source: str, classes: tuple[str, ...], named: bool
) -> Tensor:
    """A split's labels as numbers in ``classes``: by name where its own order is another."""
    if column not in table.features:
        raise DataError(f"{source}: a split has no column {column!r}; its columns are {_describe(table)}")
    labels, kind = _labels(table, column, source), table.features[column]
    if not named or not isinstance(kind, library.ClassLabel) or tuple(kind.names) == classes:
        return labels
    used = set(labels.tolist())
    return torch.from_numpy(class_mapping(kind.names, classes, used, source))[labels]


def _describe(table: Any) -> str:
    return ", ".join(f"{name} ({type(kind).__name__})" for name, kind in table.features.items())
