"""The CIFAR ResNets of depth 6n+2 (He et al. 2016, section 4.2), as the distillation literature uses them.

Widths, projection shortcuts, initialisation and parameter names are those of contrastive representation
distillation (CRD, Tian et al. 2020) and mdistiller, so that their published teachers load. Differences from
He et al.: shortcuts are projections (not zero padding), and ``x4`` means stages of 64, 128, 256 channels over
a stem of 32.
"""

from __future__ import annotations

from torch import Tensor, nn

from kdfast.models.layers import ConvNet, init_weights


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: ``relu(f(x) + shortcut(x))``."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        # Not in place anywhere in these networks: an in-place ReLU would overwrite what a tap on the batch
        # norm before it has kept, and saves nothing, since neither of the two keeps the batch norm's output
        # for backward.
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', ⌈H/stride⌉, ⌈W/stride⌉]``; ``relu2`` takes the sum."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out = self.relu2(out + shortcut)
        return out


class CifarResNet(ConvNet):
    """ResNet of depth 6n+2 in three stages at full, half and quarter resolution.

    Args:
        num_classes: Outputs of the classifier.
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110, …
        widths: Channels of the stem and of the three stages.
        in_channels: Channels of the images.

    Raises:
        ValueError: If ``depth`` is not 6n + 2 with n ≥ 1, or ``widths`` are not four positive numbers.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 20,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth of a CIFAR ResNet is 6n + 2 (8, 14, 20, …), got {depth}")
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths are four positive channel counts (stem, three stages), got {widths}")
        stem, *stage_widths = widths
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(blocks, stem, stage_widths[0], stride=1)
        self.layer2 = self._stage(blocks, stage_widths[0], stage_widths[1], stride=2)
        self.layer3 = self._stage(blocks, stage_widths[1], stage_widths[2], stride=2)
        self.fc = nn.Linear(stage_widths[2], num_classes)
        self.stages = ("layer1", "layer2", "layer3")
        self.num_features = stage_widths[2]
        init_weights(self)

    @staticmethod
    def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, widths[3], ⌈H/4⌉, ⌈W/4⌉]``, after the last ReLU."""
        x = self.relu(self.bn1(self.conv1(x)))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features
