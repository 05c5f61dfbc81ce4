"""Wide residual networks for small images (Zagoruyko & Komodakis 2016): WRN-d-k, pre-activation.

Parameter names are those of the checkpoints published with CRD (Tian et al. 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast.models.layers import ConvNet, init_weights


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice, plus a shortcut, which takes the activated input where the width changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        # Published networks project on a change of width only; a change of stride alone must not go
        # unprojected.
        self.convShortcut: nn.Conv2d | None = None
        if in_channels != channels or stride != 1:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', ⌈H/stride⌉, ⌈W/stride⌉]``, not activated."""
        activated = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out = self.dropout(self.relu2(self.bn2(self.conv1(activated))))
        return torch.add(shortcut, self.conv2(out))


class _Stage(nn.Module):
    # A module of its own only because published checkpoints name the blocks `block1.layer.0`.
    def __init__(self, blocks: int, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        first = PreActBlock(in_channels, channels, stride, dropout)
        rest = (PreActBlock(channels, channels, 1, dropout) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(ConvNet):
    """WRN-depth-width: a stem of 16 channels, then stages of 16k, 32k, 64k with (depth − 4)/6 blocks each.

    Args:
        num_classes: Outputs of the classifier.
        depth: 6n + 4: 10, 16, 22, 28, 40, …
        width: The factor k.
        in_channels: Channels of the images.
        dropout: Probability of dropping an activation between a block's two convolutions.

    Raises:
        ValueError: If ``depth`` is not 6n + 4, ``width`` is below 1, or ``dropout`` is outside [0, 1).
    """

    def __init__(
        self, num_classes: int, *, depth: int = 16, width: int = 1, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth of a wide ResNet is 6n + 4 (10, 16, 22, …), got {depth}")
        if width < 1:
            raise ValueError(f"width of a wide ResNet is at least 1, got {width}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is in [0, 1), got {dropout}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = _Stage(blocks, 16, 16 * width, 1, dropout)
        self.block2 = _Stage(blocks, 16 * width, 32 * width, 2, dropout)
        self.block3 = _Stage(blocks, 32 * width, 64 * width, 2, dropout)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, num_classes)
        # The last stage's own output is not activated: what the classifier pools comes from the ReLU after
        # it.
        self.stages = ("block1", "block2", "relu")
        self.num_features = 64 * width
        init_weights(self)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, 64·width, ⌈H/4⌉, ⌈W/4⌉]``, after the last batch norm and ReLU."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        features: Tensor = self.relu(self.bn1(x))
        return features
