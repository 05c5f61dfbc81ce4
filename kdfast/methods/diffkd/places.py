"""Which layers a method without pairs taps, and what shape they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["last_feature", "probe_images"]


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
