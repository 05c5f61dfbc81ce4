"""MobileNet V1 (Howard et al. 2017): depthwise 3×3 and pointwise 1×1, nothing else."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kdfast.models.layers import ConvNet, Stem, check_stem, init_weights, scaled

# Channels and stride of each separable block, Table 1 of the paper; a stride of 2 opens a stage.
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class SeparableBlock(nn.Module):
    """Depthwise 3×3, BN, ReLU, pointwise 1×1, BN, ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', ⌈H/stride⌉, ⌈W/stride⌉]``."""
        x = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(x)))
        return out


class MobileNetV1(ConvNet):
    """MobileNet V1 in five stages.

    Args:
        num_classes: Outputs of the classifier.
        width: Multiplier of every width.
        in_channels: Channels of the images.
        stem: ``"cifar"``: 3×3 at stride 1, features at 1/16; ``"imagenet"``: at stride 2, features at 1/32.

    Raises:
        ValueError: If ``width`` is not positive or ``stem`` is unknown.
    """

    classifier_name: ClassVar[str] = "fc"

    def __init__(
        self, num_classes: int, *, width: float = 1.0, in_channels: int = 3, stem: Stem = "cifar"
    ) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width is a positive multiplier, got {width}")
        channels = scaled(32, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1 if check_stem(stem) else 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        stages: list[list[nn.Module]] = [[]]
        for base, stride in _BLOCKS:
            if stride == 2:
                stages.append([])
            stages[-1].append(SeparableBlock(channels, scaled(base, width), stride))
            channels = scaled(base, width)
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5 = (nn.Sequential(*s) for s in stages)
        self.fc = nn.Linear(channels, num_classes)
        self.stages = ("layer1", "layer2", "layer3", "layer4", "layer5")
        self.num_features = channels
        init_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, num_features, ⌈H/16⌉, ⌈W/16⌉]`` (1/32 with the ImageNet stem), after the last ReLU."""
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        features: Tensor = self.layer5(self.layer4(self.layer3(self.layer2(x))))
        return features
