"""The networks that a recipe names: fresh ones, and trained ones with what feeds them.

One way to name a trained network, in every command: the folder of a finished run (or a ``.safetensors`` file in it),
``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``, or ``FILE.py:FACTORY`` with ``weights=FILE.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import annotated_types as at
import torch
from torch import nn

from kdfast.documents import read_text
from kdfast.errors import CheckpointError, ConfigError
from kdfast.experiments.common.bounds import Positive
from kdfast.models.foreign import create_own, is_own
from kdfast.models.outputs import logits_of
from kdfast.models.pretrained import (
    Pretrained,
    pretrained_hugging_face,
    pretrained_timm,
    pretrained_torchvision,
)
from kdfast.training.checkpoint import read_tensors
from kdfast.training.model_io import CONFIG, ModelConfig, load_model, load_model_config, plain_names

#: How names of others' networks begin.
THEIRS = {"timm:": pretrained_timm, "torchvision:": pretrained_torchvision, "hf:": pretrained_hugging_face}


@dataclass(frozen=True, kw_only=True)
class TeacherKeys:
    """What a command is told of a network beside its name.

    Attributes:
        weights: For ``FILE.py:FACTORY``: its weights, a safetensors file. Beside a ``config.json`` of kdfast's, sizes,
            mean, std and classes are read there.
        mean: Per channel, of images in [0, 1]; by default the network's own.
        std: Per channel; by default the network's own.
        class_names: File with the names of the network's classes, one a line, in the order of its outputs.
        crop_pct: When measured, images are resized to the side divided by this, and cropped at the centre (0.875 is
            ImageNet's 256 and 224). By default the network's own; 1 at another side than its.
    """

    weights: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    class_names: str | None = None
    crop_pct: Annotated[float, at.Gt(0), at.Le(1)] | None = None


def build_network(config: ModelConfig) -> nn.Module:
    """The network with fresh weights; an unknown name or option is a recipe's fault.

    Raises:
        ConfigError: Naming the nearest known models.
    """
    try:
        return config.build()
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def load_teacher(
    source: str, keys: TeacherKeys | None = None, *, image_size: int | None = None
) -> tuple[nn.Module, ModelConfig]:
    """A trained network and what feeds it. How many classes it has, it says itself; no data set is asked.

    Args:
        source: A run's folder, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` or ``FILE.py:FACTORY``.
        keys: What goes before what the network says of itself.
        image_size: For ``FILE.py:FACTORY``: the side of its images, where nothing else says it.

    Raises:
        CheckpointError: It cannot be read, or the weights do not fit.
        ConfigError: There is no such network, or what it needs was not said.
    """
    keys = keys or TeacherKeys()
    if is_own(source):
        network, described = _own(source, keys, image_size)
    elif keys.weights is not None:
        raise ConfigError(
            f"weights: got {keys.weights} for teacher {source}, accepted: none; it is for FILE.py:FACTORY"
        )
    elif (prefix := next((p for p in THEIRS if source.startswith(p)), None)) is not None:
        network, described = _theirs(source, prefix)
    else:
        network, described = load_model(source), load_model_config(source)
    return network.eval(), told(described, keys)


def told(described: ModelConfig, keys: TeacherKeys) -> ModelConfig:
    """What feeds a network, with what was said of it going before what it says of itself.

    Raises:
        ConfigError: ``class_names`` cannot be read, or is of another number of classes.
    """
    given = {
        name: value for name in ("mean", "std", "crop_pct") if (value := getattr(keys, name)) is not None
    }
    if keys.class_names is not None:
        try:
            text = read_text(keys.class_names, error=ConfigError)
        except FileNotFoundError as error:
            raise ConfigError(f"class_names: {keys.class_names}: {error.strerror}") from error
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        if len(names) != described.num_classes or len(set(names)) != len(names):
            raise ConfigError(
                f"class_names: got {len(set(names))} names in {keys.class_names}, accepted: one for each of the "
                f"network's {described.num_classes} classes"
            )
        given["classes"] = names
    return replace(described, **given)


def _theirs(source: str, prefix: str) -> tuple[nn.Module, ModelConfig]:
    try:
        found: Pretrained = THEIRS[prefix](source.removeprefix(prefix))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"teacher {source}: its weights cannot be had: {error}") from error
    return found.network, ModelConfig(
        source,
        found.num_classes,
        found.image_size,
        found.mean,
        found.std,
        classes=found.classes,
        crop_pct=found.crop_pct,
        interpolation=found.interpolation,
    )


def _own(source: str, keys: TeacherKeys, image_size: int | None) -> tuple[nn.Module, ModelConfig]:
    beside = Path(keys.weights).parent / CONFIG if keys.weights is not None else None
    known = load_model_config(str(keys.weights)) if beside is not None and beside.exists() else None
    try:
        network = create_own(source, None if known is None else known.num_classes, 3, {})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"teacher: {error}") from error
    if keys.weights is not None:
        _load_weights(network, keys.weights, source)
    if known is not None:
        return network, replace(known, model=source, options={})
    facts: Mapping[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    side = tuple(facts.get("input_size") or (None,))[-1]
    said: dict[str, Any] = {
        "mean": keys.mean or facts.get("mean"),
        "std": keys.std or facts.get("std"),
        "image_size": image_size or side or getattr(network, "image_size", None),
    }
    if missing := [name for name, value in said.items() if value is None]:
        raise ConfigError(
            f"{', '.join(missing)}: missing; say what {source} was trained with, as {missing[0]}=… (its module may "
            "have a pretrained_cfg like timm's, or the weights a config.json beside them)"
        )
    size = int(said["image_size"])
    return network, ModelConfig(
        source,
        _outputs(network, size, source),
        size,
        tuple(said["mean"]),
        tuple(said["std"]),
        crop_pct=float(facts.get("crop_pct") or 1.0),
    )


def _load_weights(network: nn.Module, path: str, source: str) -> None:
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(
            f"weights: got {path}, accepted: a .safetensors file; a pickle can run code when it is read. To convert "
            "one of your own: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')"
        )
    try:
        network.load_state_dict(plain_names(read_tensors(Path(path))))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: does not fit {source}: {' '.join(str(error).split())[:600]}"
        ) from error


@torch.no_grad()
def _outputs(network: nn.Module, size: int, source: str) -> int:
    """How many classes: by looking at what comes out."""
    try:
        logits = logits_of(network.eval()(torch.zeros(1, 3, size, size)))
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"teacher {source}: does not take images [1, 3, {size}, {size}]: {error}"
        ) from error
    if logits.dim() not in (2, 4):
        raise ConfigError(
            f"teacher {source}: gives {list(logits.shape)}, accepted: logits [B, C], or [B, C, H, W] of every pixel"
        )
    return int(logits.shape[1])


def at_side(taught: ModelConfig, image_size: int | None, crop_pct: float | None = None) -> ModelConfig:
    """What feeds a network at another side: what is cropped at its own side may not be at that one."""
    if image_size is None or image_size == taught.image_size:
        return taught
    return replace(taught, image_size=image_size, crop_pct=crop_pct or 1.0)
