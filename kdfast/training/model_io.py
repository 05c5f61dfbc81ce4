"""Finished networks: ``model.safetensors`` (a plain state dict) beside ``config.json`` (what to build)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdfast.documents import Fields, shown
from kdfast.errors import CheckpointError, require
from kdfast.models import create_model
from kdfast.models.foreign import is_own
from kdfast.training import files
from kdfast.training.checkpoint import read_json, read_tensors
from kdfast.version import __version__

WEIGHTS = "model.safetensors"
#: The weights of the epoch that measured best, beside :data:`WEIGHTS`, the last ones.
BEST = "best.safetensors"
CONFIG = "config.json"
#: Of classes, channels and sides of images in a config: beyond it no network fits into any memory.
_MOST = 1 << 20
_LONGEST = 600  # letters of a message about names that do not fit


@dataclass(frozen=True)
class ModelConfig:
    """What rebuilds a network and feeds it.

    Attributes:
        model: Name for :func:`kdfast.models.create_model`.
        num_classes: Outputs of the classifier.
        image_size: Side of the square images it was trained on, in pixels.
        mean: Per channel, subtracted from images in [0, 1].
        std: Per channel, divided by afterwards.
        in_channels: Channels of the images.
        options: Further arguments of ``create_model``, e.g. ``{"stem": "imagenet"}``.
        classes: Class names by label; empty if unknown.
        crop_pct: When measured, images are resized to ``image_size / crop_pct`` and cropped at the centre.
        interpolation: Of that resizing: ``bilinear`` or ``bicubic``.
    """

    model: str
    num_classes: int
    image_size: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    in_channels: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    def build(self) -> nn.Module:
        """The network with fresh weights."""
        return create_model(self.model, self.num_classes, in_channels=self.in_channels, **self.options)


def save_model(directory: str | Path, model: nn.Module, config: ModelConfig) -> Path:
    """Write ``model.safetensors`` and ``config.json`` atomically.

    The weights are the state dict as it is: ``safetensors.torch.load_file`` and the same architecture are enough to
    use them without kdfast.

    Raises:
        CheckpointError: The disk is full or failing.
    """
    folder = Path(directory)
    with files.reporting_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS, model)
    files.write_json(folder / CONFIG, {"kdfast": __version__, **asdict(config)})
    return folder


def save_weights(file: Path, model: nn.Module, metadata: Mapping[str, str] | None = None) -> None:
    """Write a network's state dict as safetensors, atomically.

    Args:
        file: Where to.
        model: The network.
        metadata: Texts to keep in the file's header.

    Raises:
        CheckpointError: The disk is full or failing.
    """
    serialize = require("safetensors.torch", extra="train", feature="saving a model").save
    # Cloned: safetensors refuses tied weights, and a reader without kdfast wants each under its own name.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    files.write_file(file, serialize(state, None if metadata is None else dict(metadata)))


def load_model_config(path: str | Path) -> ModelConfig:
    """Read the ``config.json`` of a saved network.

    Args:
        path: The directory of a run or model, or the ``model.safetensors`` in it.

    Raises:
        CheckpointError: There is none, or it is damaged; the message names the file.
    """
    return _read_config(_locate(path)[0])


def _read_config(folder: Path) -> ModelConfig:
    document = read_json(folder / CONFIG)
    document.pop("kdfast", None)
    return config_of(document, folder / CONFIG)


def config_of(document: Mapping[str, Any], place: str | Path) -> ModelConfig:
    """A config from its fields, as somebody's file has them.

    Args:
        document: Name and value of each field.
        place: What to call it in messages.

    Raises:
        CheckpointError: A field is unknown, missing or invalid; the message names it.
    """
    known = {f.name for f in fields(ModelConfig)}
    if unknown := sorted(document.keys() - known):
        raise CheckpointError(f"{place}: has unknown keys {shown(', '.join(unknown))[1:-1]}")
    if missing := sorted({"model", "num_classes", "image_size"} - document.keys()):
        raise CheckpointError(f"{place}: lacks {', '.join(missing)}")
    entry = Fields(dict(document), place, CheckpointError)
    channels = entry.integer("in_channels", 1, _MOST) if "in_channels" in entry else 3
    given: dict[str, Any] = {}
    for name, positive in (("mean", False), ("std", True)):
        if name in entry:
            given[name] = entry.numbers(name, positive=positive)
            if len(given[name]) != channels:
                entry.refuse(name, f"{channels} numbers, one a channel")
    classes, count = (
        entry.texts("classes") if "classes" in entry else (),
        entry.integer("num_classes", 1, _MOST),
    )
    if len(classes) > count:
        entry.refuse("classes", f"{count} names, one a class, or none")
    if "crop_pct" in entry:
        given["crop_pct"] = entry.number("crop_pct")
        if not 0 < given["crop_pct"] <= 1:
            entry.refuse("crop_pct", "a number above 0, at most 1")
    if "interpolation" in entry:
        given["interpolation"] = entry.text("interpolation")
        if given["interpolation"] not in ("bilinear", "bicubic"):
            entry.refuse("interpolation", "bilinear or bicubic")
    options = entry.mapping("options") if "options" in entry else {}
    if "pretrained" in options and options["pretrained"] is not False:
        # It would be fetched, only to be replaced by the weights beside this file.
        options = {**options, "pretrained": False}
    return ModelConfig(
        model=entry.text("model"),
        num_classes=count,
        image_size=entry.integer("image_size", 1, _MOST),
        in_channels=channels,
        options=options,
        classes=classes,
        **given,
    )


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """Rebuild a saved network, in evaluation mode.

    Args:
        path: The directory of a run or model, or a ``.safetensors`` file in it: that file is read, and no other.
        device: Where to put it.

    Raises:
        CheckpointError: A file is missing or damaged, or the weights do not fit the network that ``config.json``
            names; the message says which.
    """
    folder, file = _locate(path)
    config = _read_config(folder)
    if is_own(config.model):
        # A folder may come from anyone; a file's code is run only for whoever names the file.
        raise CheckpointError(
            f"{folder / CONFIG}: names code, {config.model}, which a folder is not trusted with; name it yourself: "
            f"{config.model} with weights={file}"
        )
    weights = plain_names(read_tensors(file))
    try:
        model = config.build()
    except (
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        RuntimeError,
        AssertionError,
        OverflowError,
    ) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error or type(error).__name__}") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        if len(problem) > _LONGEST:
            problem = f"{problem[:_LONGEST]}… ({len(weights)} weights are in the file)"
        raise CheckpointError(f"{file}: does not fit {config.model!r}: {problem}") from error
    return model.to(device).eval()


#: What wrappers put before the names of what they wrap: DataParallel, DistributedDataParallel; torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")


def plain_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights without the prefixes of wrappers, where all of them have one."""
    while prefix := next(
        (p for p in _WRAPPERS if weights and all(name.startswith(p) for name in weights)), None
    ):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _locate(path: str | Path) -> tuple[Path, Path]:
    """The folder with ``config.json``, and the weights' file: the one that was named, never another.

    Raises:
        CheckpointError: There is none, or it is no safetensors file.
    """
    path = Path(path)
    if path.is_dir():
        folder, file = path, path / WEIGHTS
    elif not path.is_file():
        raise CheckpointError(f"{path}: does not exist")
    elif path.suffix != ".safetensors":
        # The folder's own weights are not what was asked for.
        raise CheckpointError(
            f"{path}: is no .safetensors file, which is what networks are read from (nothing that needs pickle is). "
            f"Accepted: a run's folder, its {WEIGHTS}, or another .safetensors file beside its {CONFIG}"
        )
    else:
        folder, file = path.parent, path
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder}: holds no {CONFIG}, so it is not a saved model (a finished run has one)"
        )
    return folder, file
