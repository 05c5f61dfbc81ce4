"""Other people's networks with their weights, and what those were trained on: classes, side, mean, std, crop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kdfast.errors import require
from kdfast.models.foreign import create_hugging_face
from kdfast.models.registry import create_timm, create_torchvision

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Pretrained:
    """A network with its weights, and what it was trained on.

    Attributes:
        network: In evaluation mode; returns logits.
        num_classes: Its outputs.
        image_size: Side of its images.
        mean: Per channel, of images in [0, 1].
        std: Per channel.
        crop_pct: Share of the resized image's side that the centre crop keeps.
        interpolation: ``bilinear`` or ``bicubic``.
        classes: Names by label; empty if unknown.
    """

    network: nn.Module = field(repr=False)
    num_classes: int
    image_size: int = 224
    mean: tuple[float, ...] = _IMAGENET[0]
    std: tuple[float, ...] = _IMAGENET[1]
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    classes: tuple[str, ...] = ()


def pretrained_timm(name: str) -> Pretrained:
    """timm's network as timm has it: its own classifier and preprocessing.

    Raises:
        ValueError: timm has no such network.
        MissingExtraError: timm is not installed.
    """
    network = create_timm(name, None, 3, {"pretrained": True})
    facts: Mapping[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    classes = facts.get("label_names") or ()
    count = getattr(network, "num_classes", None) or facts.get("num_classes") or 1000
    return Pretrained(
        network.eval(),
        int(count),
        int(tuple(facts.get("input_size") or (3, 224, 224))[-1]),
        tuple(facts.get("mean") or _IMAGENET[0]),
        tuple(facts.get("std") or _IMAGENET[1]),
        float(facts.get("crop_pct") or 1.0),
        _interpolation(facts.get("interpolation")),
        tuple(map(str, classes)) if len(classes) == count else (),
    )


def pretrained_torchvision(name: str) -> Pretrained:
    """torchvision's network with its first weights, cropped as its presets crop.

    Raises:
        ValueError: torchvision has no such network.
        MissingExtraError: torchvision is not installed.
    """
    network = create_torchvision(name, 1000, 3, {"pretrained": True})
    models = require("torchvision.models", extra="models", feature=f"model 'torchvision:{name}'")
    size, resize = 224, 256
    if hasattr(models, "get_model_weights"):
        preset = models.get_model_weights(name)["IMAGENET1K_V1"].transforms()
        size, resize = int(preset.crop_size[0]), int(preset.resize_size[0])
    return Pretrained(network.eval(), 1000, size, *_IMAGENET, crop_pct=size / resize)


def pretrained_hugging_face(name: str) -> Pretrained:
    """🤗 Transformers' classifier, and what its image processor says.

    Raises:
        ValueError: There is no such model, or it classifies no images.
        MissingExtraError: transformers is not installed.
    """
    network: Any = create_hugging_face(name, None, 3, {"pretrained": True})
    processing = require(
        "transformers.image_processing_base", extra="diffusion", feature=f"model 'hf:{name}'"
    )
    try:
        facts, _ = processing.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:  # a model without a processor: what its config says of the size, and no normalisation
        facts = {"do_normalize": False, "size": getattr(network.config, "image_size", 224)}
    size = _side(facts.get("size"))
    crop = _side(facts.get("crop_size")) if facts.get("do_center_crop") else None
    side = crop or size or int(getattr(network.config, "image_size", 224))
    share = facts.get("crop_pct") or (crop / size if crop and size and size > crop else 1.0)
    plain = not facts.get("do_normalize", True)
    mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (facts.get("image_mean"), facts.get("image_std"))
    names = getattr(network.config, "id2label", None) or {}
    count = int(network.config.num_labels)
    named = [str(names[key]) for key in sorted(names, key=int)]
    # 🤗 fills in LABEL_0 … where nobody gave names.
    known = len(named) == count and not all(label == f"LABEL_{n}" for n, label in enumerate(named))
    return Pretrained(
        network.eval(),
        count,
        side,
        tuple(mean or _IMAGENET[0]),
        tuple(std or _IMAGENET[1]),
        float(share),
        _interpolation(facts.get("resample")),
        tuple(named) if known and len(set(named)) == count else (),
    )


def _side(size: Any) -> int | None:
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height")
    return int(size) if size else None


def _interpolation(said: Any) -> str:
    """PIL numbers bicubic 3; timm and torchvision name it."""
    return "bicubic" if said == 3 or "bicubic" in str(said).lower() else "bilinear"
