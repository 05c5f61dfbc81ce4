"""ResNet-18, -34 and -50 (He et al. 2016), with the stem for small images or the one for ImageNet.

The small-image stem (3×3, stride 1, no max-pool) is the usual one on CIFAR. Parameter names are those of the
CIFAR checkpoints published with CRD (Tian et al. 2020) and the data-free distillation papers: ``shortcut``
and ``linear``.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kdfast.models.layers import ConvNet, Stem, check_stem, init_weights, plan_stages

_WIDTHS = (64, 128, 256, 512)


def _projection(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    # An empty Sequential is the identity, and keeps the published parameter names.
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _projection(in_channels, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, width, ⌈H/stride⌉, ⌈W/stride⌉]``; ``relu2`` takes the sum."""
        out: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out = self.relu2(out + self.shortcut(x))
        return out


class Bottleneck(nn.Module):
    """1×1, 3×3 (which carries the stride), 1×1 to four times the width, and a shortcut."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = _projection(in_channels, 4 * width, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, 4·width, ⌈H/stride⌉, ⌈W/stride⌉]``; ``relu3`` takes the sum."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        activated: Tensor = self.relu3(out + self.shortcut(x))
        return activated


class ResNet(ConvNet):
    """The four-stage ResNet.

    Args:
        num_classes: Outputs of the classifier.
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        blocks: Blocks in each of the four stages.
        in_channels: Channels of the images.
        stem: ``"cifar"``: 3×3, stride 1, no pooling, so that features are at 1/8; ``"imagenet"``: 7×7, stride
            2, and a 3×3 max-pool, features at 1/32.
        output_stride: Input pixels per feature pixel; smaller than the default turns the strides of the last
            stages into dilations (as dense prediction wants). None: 8 for the CIFAR stem, 32 for the ImageNet
            stem.

    Raises:
        ValueError: If ``stem`` or ``output_stride`` is none of the accepted values.
    """

    classifier_name: ClassVar[str] = "linear"

    def __init__(
        self,
        num_classes: int,
        *,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        blocks: tuple[int, int, int, int] = (2, 2, 2, 2),
        in_channels: int = 3,
        stem: Stem = "cifar",
        output_stride: int | None = None,
    ) -> None:
        super().__init__()
        small = check_stem(stem)
        self.conv1 = nn.Conv2d(
            in_channels, 64, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False
        )
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        channels = 64
        layers: list[nn.Sequential] = []
        plans = plan_stages(1 if small else 4, (1, 2, 2, 2), output_stride)
        for width, count, plan in zip(_WIDTHS, blocks, plans):
            stage: list[nn.Module] = [block(channels, width, plan.stride, plan.first_dilation)]
            channels = width * block.expansion
            stage += [block(channels, width, 1, plan.dilation) for _ in range(count - 1)]
            layers.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.linear: nn.Module = nn.Linear(channels, num_classes)
        self.stages = ("layer1", "layer2", "layer3", "layer4")
        self.num_features = channels
        init_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, num_features, ⌈H/output_stride⌉, ⌈W/output_stride⌉]``, after the last ReLU."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features
