"""Where the channels of a 4-d activation are: ``[B, C, H, W]`` or ``[B, H, W, C]``, of any network.

A shape alone does not tell: ``[B, 64, 64, 128]`` is a map of 64 channels of a 512×1024 picture, or one of 128 channels
of a square one. What tells, in this order: the last module within the layer that has a number of channels; the
picture's proportions, which one of the two readings has; a network without a layer norm, in which nothing works on a
last axis. What is ambiguous then is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdfast.models.maps import Layout, as_map
from kdfast.models.places import Place

__all__ = ["Reading", "layout_of", "reading_of"]

#: How much two ratios may differ: sizes are rounded at every stride.
_ROUNDING = 1.25


@dataclass(frozen=True)
class Reading:
    """How a layer's activations are read as maps.

    Attributes:
        layer: By name, for messages.
        layout: Where the channels of 4-d ones are.
        tokens: Which tokens of 3-d ones are the map's, as a slice; None for all, after a class token or without.
        grid: Their rows and columns; None for a square.
    """

    layer: str
    layout: Layout
    tokens: tuple[int, int | None] | None = None
    grid: tuple[int, int] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """An activation as ``[B, C, H, W]``; see :func:`kdfast.models.maps.as_map`."""
        return as_map(x, self.layout, self.layer, tokens=self.tokens, grid=self.grid)


def reading_of(
    network: nn.Module,
    layer: str,
    x: Tensor,
    layout: Layout,
    images: Any = None,
    tokens: tuple[int, int | None] | None = None,
) -> Reading:
    """Find out by one activation how a layer's are read.

    Args:
        network: As for :func:`layout_of`, and so are ``layer``, ``x``, ``layout`` and ``images``.
        layer: See there.
        x: See there.
        layout: See there.
        images: See there; tokens of pictures that are no squares form a grid of their proportions.
        tokens: Which ones are the map's.

    Raises:
        ValueError: See :func:`layout_of`.
    """
    grid = _grid(x, images, tokens) if x.dim() == 3 else None
    return Reading(layer, layout_of(network, layer, x, layout, images), tokens, grid)


def _grid(x: Tensor, images: Any, tokens: tuple[int, int | None] | None) -> tuple[int, int] | None:
    """Rows and columns of tokens, by the stride at which the picture has as many; None for a square."""
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[2] == images.shape[3]:
        return None
    count = x.shape[1] if tokens is None else x[:, slice(*tokens)].shape[1]
    size = (images.shape[2], images.shape[3])
    for stride in range(1, max(size) + 1):
        for grid in ((-(-size[0] // stride), -(-size[1] // stride)), (size[0] // stride, size[1] // stride)):
            if grid[0] * grid[1] == count or (tokens is None and grid[0] * grid[1] == count - 1):
                return grid
    return None


def layout_of(network: nn.Module, layer: str, x: Tensor, layout: Layout, images: Any = None) -> Layout:
    """``"channels_first"`` or ``"channels_last"`` of what a layer put out.

    Args:
        network: It was put out by this one.
        layer: By the layer of this name; ``"NAME:input"`` and ``":output"`` as for taps.
        x: The activation. Others than 4-d ones have but one layout.
        layout: What the user says; ``"auto"`` finds out.
        images: What the network ran on; its proportions count if it is ``[B, C, H, W]``.

    Raises:
        ValueError: Both readings are possible; the message says what to set.
    """
    if layout != "auto":
        return layout
    if x.dim() != 4:
        return "channels_first"
    found = _by_module(network, layer, x) or _by_proportions(x, images)
    if found is not None:
        return found
    if not any("Norm" in type(module).__name__ and not _spatial(module) for module in network.modules()):
        return "channels_first"
    raise ValueError(
        f"layer {layer!r} gave shape {tuple(x.shape)}, and whether its channels are {x.shape[1]} (channels_first) or "
        f"{x.shape[3]} (channels_last) cannot be told; set its layout"
    )


def _spatial(module: nn.Module) -> bool:
    """Whether a norm works on the second axis."""
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) or "2d" in type(module).__name__


def _by_module(network: nn.Module, layer: str, x: Tensor) -> Layout | None:
    """By the channels of the last module within the layer that has any; nothing is known of inputs."""
    modules = dict(network.named_modules())
    place = Place.parse(layer, modules)
    if place.is_input or not place.layer or place.layer not in modules:
        return None
    first: Layout = "channels_first"
    for module in reversed(list(modules[place.layer].modules())):
        on_last = isinstance(module, nn.Linear) or (
            type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and not _spatial(module)
        )
        channels = _channels(module)
        if channels is None:
            continue
        fits = x.shape[1] == channels, x.shape[3] == channels
        if fits == (True, True):
            return "channels_last" if on_last else first
        if any(fits):
            return first if fits[0] else "channels_last"
        return None
    return None


def _channels(module: Any) -> int | None:
    for name in ("out_channels", "num_features", "num_channels", "out_features"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if isinstance(shape, (tuple, list)) and shape else None


def _by_proportions(x: Tensor, images: Any) -> Layout | None:
    """By whose height and width are in the picture's proportion, if just one reading's are."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        return None
    wanted = images.shape[2] / images.shape[3]
    first, last = (
        max(ratio / wanted, wanted / ratio) <= _ROUNDING
        for ratio in (x.shape[2] / x.shape[3], x.shape[1] / x.shape[2])
    )
    if first == last:
        return None
    return "channels_first" if first else "channels_last"
