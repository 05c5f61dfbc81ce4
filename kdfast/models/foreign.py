"""Other people's networks: 🤗 Transformers' image classifiers by ``hf:NAME``, one's own by ``FILE.py:FACTORY``.

And what theirs were trained on, for those that come with weights: classes, size, mean, std and how images are cropped.
Nothing here reads a pickle or runs code from a hub: weights are safetensors, and the only code that is run is a file
that the caller named.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from kdfast.errors import require
from kdfast.models.outputs import logits_of

_OWN = re.compile(r"(?P<file>.+\.py):(?P<factory>[A-Za-z_]\w*)")
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


def is_own(name: str) -> bool:
    """Whether a name is ``FILE.py:FACTORY``."""
    return _OWN.fullmatch(name) is not None


def create_own(
    name: str, num_classes: int | None, in_channels: int, options: Mapping[str, object]
) -> nn.Module:
    """Call a factory of a file. It is given ``num_classes`` and ``in_channels`` if it takes them.

    Raises:
        ValueError: There is no such file or factory, or it returns no module.
        TypeError: It does not take the options.
    """
    match = _OWN.fullmatch(name)
    if match is None:
        raise ValueError(f"model: got {name!r}, accepted: FILE.py:FACTORY")
    path = Path(match["file"]).resolve()
    if not path.is_file():
        raise ValueError(f"model {name!r}: {path} is no file")
    module = _import(path)
    factory = getattr(module, match["factory"], None)
    if not callable(factory):
        known = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(f"model {name!r}: {path.name} has no {match['factory']!r}; it has {known or 'none'}")
    given = dict(options)
    offered = {"in_channels": in_channels} | ({} if num_classes is None else {"num_classes": num_classes})
    taken = inspect.signature(factory).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    given |= {key: value for key, value in offered.items() if key in taken or anything}
    network = factory(**given)
    if not isinstance(network, nn.Module):
        raise ValueError(f"model {name!r}: got {type(network).__name__} from it, accepted: a torch.nn.Module")
    return with_logits(network)


def create_hugging_face(
    name: str, num_classes: int | None, in_channels: int, options: Mapping[str, object]
) -> nn.Module:
    """A classifier of 🤗 Transformers, with fresh weights or with ``pretrained=True`` the hub's.

    ``num_classes=None`` leaves the classifier as it is; another number than its own replaces it.

    Raises:
        ValueError: There is no such model, or it classifies no images.
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", extra="diffusion", feature=f"model 'hf:{name}'")
    pretrained = bool(options.get("pretrained", False))
    if in_channels != 3:
        raise ValueError(f"model 'hf:{name}' is for 3 channels; got {in_channels}")
    automatic = transformers.AutoModelForImageClassification
    labels = {} if num_classes is None else {"num_labels": num_classes}
    try:
        if pretrained:
            network = automatic.from_pretrained(
                name, use_safetensors=True, ignore_mismatched_sizes=num_classes is not None, **labels
            )
        else:
            network = automatic.from_config(transformers.AutoConfig.from_pretrained(name, **labels))
    except (OSError, KeyError, ValueError) as error:
        said = " ".join(str(error).split())[:400]
        raise ValueError(
            f"model 'hf:{name}' cannot be had from 🤗 Transformers (safetensors only): {said}"
        ) from error
    return with_logits(network)


def with_logits(network: nn.Module) -> nn.Module:
    """The network, returning logits where it returned an object, a dict or a tuple; its state dict stays as it is."""
    network.register_forward_hook(_to_logits)
    return network


def _to_logits(module: nn.Module, inputs: Any, output: Any) -> Any:
    return logits_of(output)


def pretrained_timm(name: str) -> Pretrained:
    """timm's network as timm has it: its own classifier and preprocessing.

    Raises:
        ValueError: timm has no such network.
        MissingExtraError: timm is not installed.
    """
    from kdfast.models.registry import create_timm

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
    from kdfast.models.registry import create_torchvision

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


def _import(path: Path) -> Any:
    name = f"kdfast_own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"model: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # its neighbours, while it is imported
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
