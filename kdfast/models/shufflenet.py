"""ShuffleNet V1 (Zhang et al. 2018) and V2 (Ma et al. 2018) for small images, as in CRD (Tian et al. 2020).

By default the stem is a 1×1 convolution without pooling. Parameter names are the published ones, and so is
the initialisation, which is PyTorch's default.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdfast.models.layers import ChannelShuffle, ConvNet, Stem, check_stem

_STEM = 24
# The paper's 4 and 8 groups do not divide the narrower bottleneck of the published CIFAR networks.
_V1_WIDTHS = {1: (144, 288, 576), 2: (200, 400, 800), 3: (240, 480, 960)}
_V2_WIDTHS = {0.5: (48, 96, 192, 1024), 1.0: (116, 232, 464, 1024), 1.5: (176, 352, 704, 1024)}


def _pointwise(in_channels: int, channels: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 1, groups=groups, bias=False)


def _stem(in_channels: int, stem: Stem) -> tuple[nn.Conv2d, nn.Module]:
    """The first convolution, and the pooling after it."""
    if check_stem(stem):
        return _pointwise(in_channels, _STEM), nn.Identity()
    return nn.Conv2d(in_channels, _STEM, 3, 2, 1, bias=False), nn.MaxPool2d(3, 2, 1)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)


class ShuffleUnitV1(nn.Module):
    """Grouped 1×1, shuffle, depthwise 3×3, grouped 1×1; added to the input, or beside it at stride 2."""

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        # At stride 2 the pooled input is concatenated, so the branch makes only the channels that are
        # missing.
        made = channels - in_channels if stride == 2 else channels
        middle = made // 4
        # The stem's 24 channels are too few to group (Zhang et al., section 3.2).
        first_groups = 1 if in_channels == _STEM else groups
        self.conv1 = _pointwise(in_channels, middle, first_groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.relu1 = nn.ReLU()
        self.shuffle1 = ChannelShuffle(first_groups)
        self.conv2 = _depthwise(middle, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        # The paper has no ReLU here; the published CIFAR networks do.
        self.relu2 = nn.ReLU()
        self.conv3 = _pointwise(middle, made, groups)
        self.bn3 = nn.BatchNorm2d(made)
        self.shortcut = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.concatenate = stride == 2
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, channels, ⌈H/stride⌉, ⌈W/stride⌉]``; ``relu3`` takes the sum."""
        out = self.shuffle1(self.relu1(self.bn1(self.conv1(x))))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = self.shortcut(x)
        joined = torch.cat((out, shortcut), 1) if self.concatenate else out + shortcut
        activated: Tensor = self.relu3(joined)
        return activated


class ShuffleNetV1(ConvNet):
    """ShuffleNet V1 in three stages of 4, 8 and 4 units, features at 1/8.

    Args:
        num_classes: Outputs of the classifier.
        groups: Groups of the 1×1 convolutions: 1, 2 or 3; the widths follow Table 1 of the paper.
        in_channels: Channels of the images.
        stem: ``"cifar"``: a 1×1 convolution; ``"imagenet"``: 3×3 at stride 2 and a max-pool, features at
            1/32.

    Raises:
        ValueError: If ``groups`` is none of the three, or ``stem`` is unknown.
    """

    classifier_name: ClassVar[str] = "linear"

    def __init__(
        self, num_classes: int, *, groups: int = 3, in_channels: int = 3, stem: Stem = "cifar"
    ) -> None:
        super().__init__()
        if groups not in _V1_WIDTHS:
            raise ValueError(f"groups of ShuffleNet V1 is one of {sorted(_V1_WIDTHS)}, got {groups}")
        widths = _V1_WIDTHS[groups]
        self.conv1, self.maxpool = _stem(in_channels, stem)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(_STEM, widths[0], 4, groups)
        self.layer2 = self._stage(widths[0], widths[1], 8, groups)
        self.layer3 = self._stage(widths[1], widths[2], 4, groups)
        self.linear = nn.Linear(widths[2], num_classes)
        self.stages = ("layer1", "layer2", "layer3")
        self.num_features = widths[2]

    @staticmethod
    def _stage(in_channels: int, channels: int, units: int, groups: int) -> nn.Sequential:
        first = ShuffleUnitV1(in_channels, channels, 2, groups)
        return nn.Sequential(first, *(ShuffleUnitV1(channels, channels, 1, groups) for _ in range(units - 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, num_features, ⌈H/8⌉, ⌈W/8⌉]``, after the last ReLU."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features


class ShuffleUnitV2(nn.Module):
    """Half the channels pass through, the other half takes 1×1, depthwise 3×3, 1×1; then a shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _pointwise(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = _depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _pointwise(half, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels, H, W]`` to the same shape."""
        kept, taken = x.chunk(2, 1)
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(taken)))))
        out = self.relu2(self.bn3(self.conv3(out)))
        shuffled: Tensor = self.shuffle(torch.cat((kept, out), 1))
        return shuffled


class ShuffleDownV2(nn.Module):
    """The unit that halves the resolution: two branches over all channels, concatenated and shuffled."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _depthwise(in_channels, 2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = _pointwise(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv3 = _pointwise(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv4 = _depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _pointwise(half, half)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, channels, ⌈H/2⌉, ⌈W/2⌉]``."""
        left = self.relu1(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.relu2(self.bn3(self.conv3(x)))))
        right = self.relu3(self.bn5(self.conv5(right)))
        shuffled: Tensor = self.shuffle(torch.cat((left, right), 1))
        return shuffled


class ShuffleNetV2(ConvNet):
    """ShuffleNet V2 in three stages of 4, 8 and 4 units and a wide 1×1, features at 1/8.

    Args:
        num_classes: Outputs of the classifier.
        size: Width: 0.5, 1 or 1.5; widths follow Table 5 of the paper.
        in_channels: Channels of the images.
        stem: ``"cifar"``: a 1×1 convolution; ``"imagenet"``: 3×3 at stride 2 and a max-pool, features at
            1/32.

    Raises:
        ValueError: If ``size`` is none of the three, or ``stem`` is unknown.
    """

    classifier_name: ClassVar[str] = "linear"

    def __init__(
        self, num_classes: int, *, size: float = 1.0, in_channels: int = 3, stem: Stem = "cifar"
    ) -> None:
        super().__init__()
        if size not in _V2_WIDTHS:
            raise ValueError(f"size of ShuffleNet V2 is one of {sorted(_V2_WIDTHS)}, got {size}")
        widths = _V2_WIDTHS[size]
        self.conv1, self.maxpool = _stem(in_channels, stem)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu1 = nn.ReLU()
        self.layer1 = self._stage(_STEM, widths[0], 4)
        self.layer2 = self._stage(widths[0], widths[1], 8)
        self.layer3 = self._stage(widths[1], widths[2], 4)
        self.conv2 = _pointwise(widths[2], widths[3])
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(widths[3], num_classes)
        # The wide 1×1 is what the classifier pools, so it ends the list.
        self.stages = ("layer1", "layer2", "layer3", "relu2")
        self.num_features = widths[3]

    @staticmethod
    def _stage(in_channels: int, channels: int, units: int) -> nn.Sequential:
        first = ShuffleDownV2(in_channels, channels)
        return nn.Sequential(first, *(ShuffleUnitV2(channels) for _ in range(units - 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, num_features, ⌈H/8⌉, ⌈W/8⌉]``, after the last ReLU."""
        x = self.maxpool(self.relu1(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        features: Tensor = self.relu2(self.bn2(self.conv2(x)))
        return features
