"""Finished networks: ``model.safetensors`` (a plain state dict) beside ``config.json`` (what to build)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdfast.errors import CheckpointError, require
from kdfast.models import create_model
from kdfast.training import files
from kdfast.training.checkpoint import read_json, read_tensors
from kdfast.version import __version__

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


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
    """

    model: str
    num_classes: int
    image_size: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    in_channels: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()

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
    serialize = require("safetensors.torch", extra="train", feature="saving a model").save
    folder = Path(directory)
    with files.reporting_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # Cloned: safetensors refuses tied weights, and a reader without kdfast wants each under its own name.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    files.write_file(folder / WEIGHTS, serialize(state))
    files.write_json(folder / CONFIG, {"kdfast": __version__, **asdict(config)})
    return folder


def load_model_config(path: str | Path) -> ModelConfig:
    """Read the ``config.json`` of a saved network.

    Args:
        path: The directory of a run or model, or the ``model.safetensors`` in it.

    Raises:
        CheckpointError: There is none, or it is damaged; the message names the file.
    """
    folder = _folder(path)
    document = read_json(folder / CONFIG)
    document.pop("kdfast", None)
    known = {f.name for f in fields(ModelConfig)}
    if unknown := sorted(document.keys() - known):
        raise CheckpointError(f"{folder / CONFIG}: has unknown keys {', '.join(unknown)}")
    if missing := sorted({"model", "num_classes", "image_size"} - document.keys()):
        raise CheckpointError(f"{folder / CONFIG}: lacks {', '.join(missing)}")
    entries: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in document.items()}
    return ModelConfig(**entries)


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """Rebuild a saved network, in evaluation mode.

    Args:
        path: The directory of a run or model, or the ``model.safetensors`` in it.
        device: Where to put it.

    Raises:
        CheckpointError: A file is missing or damaged, or the weights do not fit the network that ``config.json``
            names; the message says which.
    """
    folder = _folder(path)
    config = load_model_config(folder)
    weights = read_tensors(folder / WEIGHTS)
    try:
        model = config.build()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{folder / WEIGHTS}: does not fit {config.model!r}: {problem}") from error
    return model.to(device).eval()


def _folder(path: str | Path) -> Path:
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise CheckpointError(f"{path}: does not exist")
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder}: holds no {CONFIG}, so it is not a saved model (a finished run has one)"
        )
    return folder
