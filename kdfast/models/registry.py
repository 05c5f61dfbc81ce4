"""Networks by name: the papers' CIFAR networks here, others through ``timm:``, ``torchvision:``, ``hf:``, or a file."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable
from functools import partial

from torch import nn

from kdfast.errors import require
from kdfast.models.deeplab import DeepLabV3
from kdfast.models.foreign import create_hugging_face, create_own, is_own
from kdfast.models.gap2 import Gap2
from kdfast.models.mobilenet_v1 import MobileNetV1
from kdfast.models.mobilenet_v2 import MobileNetV2
from kdfast.models.resnet import BasicBlock, Bottleneck, ResNet
from kdfast.models.resnet_cifar import CifarResNet
from kdfast.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from kdfast.models.vgg import VGG, VGG8, VGG11, VGG13
from kdfast.models.wrn import WideResNet

Builder = Callable[..., nn.Module]

_BY_FOUR = (32, 64, 128, 256)

_BUILDERS: dict[str, Builder] = {
    **{f"resnet{d}": partial(CifarResNet, depth=d) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": partial(CifarResNet, depth=d, widths=_BY_FOUR) for d in (8, 32)},
    "resnet18": partial(ResNet, block=BasicBlock, blocks=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, block=BasicBlock, blocks=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, block=Bottleneck, blocks=(3, 4, 6, 3)),
    **{f"wrn_{d}_{k}": partial(WideResNet, depth=d, width=k) for d in (16, 40) for k in (1, 2)},
    "vgg8": partial(VGG, widths=VGG8),
    "vgg11": partial(VGG, widths=VGG11),
    "vgg13": partial(VGG, widths=VGG13),
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "shufflenet_v1": ShuffleNetV1,
    "shufflenet_v2": ShuffleNetV2,
    "gap2": Gap2,
    "deeplabv3_resnet50": partial(DeepLabV3, backbone="resnet50"),
    "deeplabv3_mobilenet_v2": partial(DeepLabV3, backbone="mobilenet_v2"),
}

# What other code bases call the same networks, after lower-casing and '-' → '_'.
_ALIASES = {
    "vgg8_bn": "vgg8",
    "vgg11_bn": "vgg11",
    "vgg13_bn": "vgg13",
    "mobilenetv1": "mobilenet_v1",
    "mobilenetv2": "mobilenet_v2",
    "deeplabv3_mobilenet": "deeplabv3_mobilenet_v2",
    "shufflenetv1": "shufflenet_v1",
    "shufflenetv2": "shufflenet_v2",
    "shufflev1": "shufflenet_v1",
    "shufflev2": "shufflenet_v2",
}
_WIDE = re.compile(r"(?:wrn|wide_?resnet|wresnet)_?(\d+)_(\d+)")


def list_models(pattern: str = "*") -> list[str]:
    """Names that :func:`create_model` knows, in natural order; ``wrn_D_K`` works for any D = 6n + 4.

    Args:
        pattern: A shell-style filter, e.g. ``"resnet*"``.
    """
    return sorted(fnmatch.filter(_BUILDERS, pattern), key=_natural)


def create_model(name: str, num_classes: int, *, in_channels: int = 3, **kwargs: object) -> nn.Module:
    """Build a network with fresh weights: a classifier, or with ``deeplabv3_*`` a classifier of every pixel.

    The networks of the papers (:func:`list_models`) take images of any size and have ``forward_features``,
    ``forward_head``, ``stages`` and ``num_features`` (:class:`~kdfast.models.layers.ConvNet`). Upper case,
    ``-`` for ``_``, and the spellings of CRD and mdistiller (``ShuffleV1``, ``vgg13_bn``, ``WRN-40-2``) are
    understood.

    Args:
        name: A name from :func:`list_models`, ``wrn_D_K``, ``timm:NAME``, ``torchvision:NAME`` or ``hf:NAME`` for one
            of theirs, or ``FILE.py:FACTORY`` for what a function of yours returns.
        num_classes: Outputs of the classifier, at least 1.
        in_channels: Channels of the images, at least 1.
        **kwargs: Options of that network, e.g. ``stem="imagenet"`` for resnet18/34/50; for ``timm:`` those of
            ``timm.create_model``, e.g. ``pretrained=True``.

    Raises:
        ValueError: If the name is unknown (the nearest known ones are named), or a number is out of range.
        TypeError: If the network has no such option.
        MissingExtraError: If ``timm:`` is asked for and timm cannot be imported.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{argument} is an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{argument} is at least 1, got {value}")
    if name.startswith("timm:"):
        return create_timm(name.removeprefix("timm:"), num_classes, in_channels, kwargs)
    if name.startswith("torchvision:"):
        return create_torchvision(name.removeprefix("torchvision:"), num_classes, in_channels, kwargs)
    if name.startswith("hf:"):
        return create_hugging_face(name.removeprefix("hf:"), num_classes, in_channels, kwargs)
    if is_own(name):
        return create_own(name, num_classes, in_channels, kwargs)
    builder = _find(name)
    _check_options(name, builder, kwargs)
    return builder(num_classes, in_channels=in_channels, **kwargs)


def _find(name: str) -> Builder:
    spelled = name.lower().replace("-", "_")
    spelled = _ALIASES.get(spelled, spelled)
    if spelled in _BUILDERS:
        return _BUILDERS[spelled]
    if match := _WIDE.fullmatch(spelled):
        return partial(WideResNet, depth=int(match[1]), width=int(match[2]))
    near = difflib.get_close_matches(spelled, [*_BUILDERS, *_ALIASES], n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(list_models())}"
    raise ValueError(f"unknown model {name!r}; {hint} (any network of timm's: timm:NAME)")


def _check_options(name: str, builder: Builder, options: dict[str, object]) -> None:
    fixed = builder.keywords if isinstance(builder, partial) else {}
    accepted = [
        option
        for option in inspect.signature(builder).parameters
        if option not in ("num_classes", "in_channels") and option not in fixed
    ]
    if unknown := [option for option in options if option not in accepted]:
        raise TypeError(
            f"model {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"it accepts {', '.join(accepted) if accepted else 'none'}"
        )


def create_timm(
    name: str, num_classes: int | None, in_channels: int, options: dict[str, object]
) -> nn.Module:
    """One of timm's; ``num_classes=None`` leaves the classifier as timm has it, trained or not."""
    timm = require("timm", extra="models", feature=f"model 'timm:{name}'")
    # timm throws a trained classifier away when it is told another number of classes, or even says one itself.
    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        model: nn.Module = timm.create_model(name, in_chans=in_channels, **classes, **options)
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(f'timm:{other}' for other in near)}?" if near else ""
        raise ValueError(f"timm has no model {name!r}{hint}") from error
    return model


def create_torchvision(
    name: str, num_classes: int, in_channels: int, options: dict[str, object]
) -> nn.Module:
    """For the networks that timm does not have (ShuffleNetV2); ``pretrained`` are torchvision's first weights."""
    models = require("torchvision.models", extra="models", feature=f"model 'torchvision:{name}'")
    if name not in models.list_models():
        near = difflib.get_close_matches(name, models.list_models(), n=3)
        hint = f"; did you mean {', '.join(f'torchvision:{other}' for other in near)}?" if near else ""
        raise ValueError(f"torchvision has no model {name!r}{hint}")
    pretrained = bool(options.pop("pretrained", False))
    if in_channels != 3 or (pretrained and num_classes != 1000):
        raise ValueError(
            f"model 'torchvision:{name}' is for 3 channels, and its weights for 1000 classes; got {in_channels} and "
            f"{num_classes}"
        )
    weights = "IMAGENET1K_V1" if pretrained else None
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        # Detectors and segmenters would fetch their backbones' weights, asked for or not.
        options.setdefault("weights_backbone", None)
    model: nn.Module = models.get_model(name, weights=weights, num_classes=num_classes, **options)
    return model


def _natural(name: str) -> list[tuple[int, str | int]]:
    parts = re.split(r"(\d+)", name)
    return [(1, int(part)) if part.isdigit() else (0, part) for part in parts]
