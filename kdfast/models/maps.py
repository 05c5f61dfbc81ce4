"""Activations of any network as maps ``[B, C, H, W]`` of one size, and where the last one is."""

from __future__ import annotations

import math
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Layout", "Resize", "Shared", "as_map", "fit", "last_feature", "probe_images"]

Layout = Literal["auto", "channels_first", "channels_last"]
Resize = Literal["student", "refuse"]
T = TypeVar("T")


def as_map(
    x: Tensor,
    layout: Layout,
    layer: str,
    *,
    tokens: tuple[int, int | None] | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """An activation as ``[B, C, H, W]``; a view, which is not copied.

    Args:
        x: ``[B, C]``, tokens ``[B, N, C]``, ``[B, C, H, W]`` or ``[B, H, W, C]``.
        layout: Where the channels of a 4-d activation are, ``"channels_first"`` or ``"channels_last"``; for
            ``"auto"`` ask :func:`kdfast.models.layouts.layout_of` before.
        layer: For messages.
        tokens: Which ones are the map's, from the first to before the second as in a slice; by default all, or all
            but a class token.
        grid: Rows and columns that they form; by default a square.

    Raises:
        ValueError: It has another rank, is no floating-point tensor, or its tokens form no square (or not that grid).
    """
    if not x.is_floating_point():
        raise ValueError(f"layer {layer!r} gave {x.dtype}; a floating-point activation is needed")
    if x.dim() == 2:
        return x[:, :, None, None]
    if x.dim() == 3:
        chosen = x if tokens is None else x[:, slice(*tokens)]
        count = chosen.shape[1]
        height, width = grid or (math.isqrt(count),) * 2
        extra = count - height * width
        if height * width == 0 or not 0 <= extra <= (tokens is None):
            form = f"a grid of {grid[0]}×{grid[1]}, as when the method was made" if grid else "a square"
            raise ValueError(
                f"layer {layer!r} gave shape {tuple(x.shape)}; tokens [B, N, C] must form {form}, after one class "
                "token at most; which ones are the map's can be said with student_tokens or teacher_tokens"
            )
        return chosen[:, extra:].reshape(len(x), height, width, -1).movedim(-1, 1)
    if x.dim() != 4:
        raise ValueError(
            f"layer {layer!r} gave shape {tuple(x.shape)}; accepted: [B, C], [B, N, C], [B, C, H, W], [B, H, W, C]"
        )
    return x.movedim(-1, 1) if layout == "channels_last" else x


def fit(student: Tensor, size: tuple[int, int], resize: Resize, layers: str) -> Tensor:
    """A student's map ``[B, C, h, w]`` in the teacher's size.

    Averaged over areas in a direction in which it is larger, then bilinear in one in which it is smaller.

    Raises:
        ValueError: The sizes differ and ``resize`` is ``"refuse"``.
    """
    have = (student.shape[2], student.shape[3])
    if have == size:
        return student
    if resize == "refuse":
        raise ValueError(
            f"pairs: {layers} are {have[0]}×{have[1]} and {size[0]}×{size[1]}; sizes must match with "
            "resize='refuse' (or set resize to 'student')"
        )
    smaller = (min(have[0], size[0]), min(have[1], size[1]))
    if smaller != have:
        student = F.adaptive_avg_pool2d(student, smaller)
    if smaller != size:
        student = F.interpolate(student, size=size, mode="bilinear", align_corners=False)
    return student


def last_feature(network: nn.Module, argument: str) -> str:
    """The layer whose output is the last map before pooling.

    Known for this package's networks and for timm's, whose ``global_pool`` or ``head`` takes it.

    Raises:
        ValueError: It is some other network.
    """
    stages = getattr(network, "stages", None)
    if isinstance(stages, tuple) and stages and all(isinstance(stage, str) for stage in stages):
        return str(stages[-1])
    modules = dict(network.named_modules())
    if "global_pool" in modules:
        return "global_pool:input"
    if "head.global_pool" in modules:
        return "head:input"
    if isinstance(modules.get("norm"), nn.LayerNorm):  # a transformer that pools its tokens itself
        return "norm"
    top = ", ".join(name for name, _ in network.named_children())
    raise ValueError(
        f"{argument}: got None, and the last feature map of a {type(network).__name__} is not known; name a layer "
        f"(its top ones are {top or 'none'})"
    )


def probe_images(network: nn.Module) -> Tensor:
    """Two blank images of the size and channels that the network asks for, on its device."""
    facts: Any = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    _, *size = facts.get("input_size", (3, 64, 64))
    channels = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), 3)
    weight = next(network.parameters())
    return torch.zeros(2, channels, *size, device=weight.device, dtype=weight.dtype)


class Shared(Generic[T]):
    """A value that copies of its owner share: the teacher, in a moving average of a method's weights."""

    def __init__(self, value: T) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared[T]:
        return self
