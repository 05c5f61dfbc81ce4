"""DeepLabV3 (Chen et al. 2017, "Rethinking atrous convolution"): one class for every pixel.

The head is torchvision's: atrous pyramid pooling to 256 channels, dropout, a 3×3 convolution, the 1×1
classifier.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.models.layers import Stem, init_weights
from kdfast.models.mobilenet_v2 import MobileNetV2
from kdfast.models.resnet import Bottleneck, ResNet

_WIDTH = 256
# Atrous rates at output stride 16; twice the resolution asks for twice the rates (section 3.3).
_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}


def _conv_bn_relu(in_channels: int, channels: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(in_channels, channels, kernel, 1, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


class AtrousPyramid(nn.Module):
    """A 1×1, three dilated 3×3 and the pooled image, side by side, merged by a 1×1 (section 3.3)."""

    def __init__(self, in_channels: int, rates: tuple[int, int, int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                _conv_bn_relu(in_channels, _WIDTH, 1),
                *(_conv_bn_relu(in_channels, _WIDTH, 3, r) for r in rates),
            ]
        )
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv_bn_relu(in_channels, _WIDTH, 1))
        self.project = nn.Sequential(*_conv_bn_relu(5 * _WIDTH, _WIDTH, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` to ``[B, 256, h, w]``.

        Raises:
            ValueError: In training, for a batch of one: the pooled image has no variance to normalise by.
        """
        if self.training and x.shape[0] < 2:
            raise ValueError("DeepLabV3 needs at least two images a batch in training, got 1")
        pooled = self.image(x).expand(-1, -1, *x.shape[-2:])
        merged: Tensor = self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))
        return merged


def _backbone(name: str, in_channels: int, stem: Stem, output_stride: int) -> ResNet | MobileNetV2:
    """A classifier without what comes after its features (empty Sequentials: identities without parameters)."""
    if name == "resnet50":
        # With the small stem its own stride is 8 already, and there is nothing to dilate.
        stride = min(output_stride, 8) if stem == "cifar" else output_stride
        blocks = (3, 4, 6, 3)
        resnet = ResNet(
            1, block=Bottleneck, blocks=blocks, in_channels=in_channels, stem=stem, output_stride=stride
        )
        resnet.linear = nn.Sequential()
        return resnet
    if name == "mobilenet_v2":
        mobilenet = MobileNetV2(1, width=1.0, in_channels=in_channels, stem=stem, output_stride=output_stride)
        mobilenet.conv2 = nn.Sequential()
        mobilenet.classifier = nn.Sequential()
        return mobilenet
    raise ValueError(f'backbone is "resnet50" or "mobilenet_v2", got {name!r}')


class DeepLabV3(nn.Module):
    """Images ``[B, in_channels, H, W]`` to logits ``[B, num_classes, H, W]``.

    Args:
        num_classes: Classes of a pixel.
        backbone: ``"resnet50"``, or ``"mobilenet_v2"`` at full width without its last 1×1.
        in_channels: Channels of the images.
        output_stride: Input pixels per backbone pixel, 8 or 16.
        stem: Of the backbone; ``"cifar"`` keeps small images at a higher resolution at first.

    Attributes:
        stages: Names of the backbone's stages; the last one's output is :meth:`forward_features`.
        num_features: Channels of the backbone's output.

    Raises:
        ValueError: If ``backbone``, ``output_stride`` or ``stem`` is none of the accepted values.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: Literal["resnet50", "mobilenet_v2"] = "resnet50",
        in_channels: int = 3,
        output_stride: int = 16,
        stem: Stem = "imagenet",
    ) -> None:
        super().__init__()
        if output_stride not in _RATES:
            raise ValueError(f"output_stride of DeepLabV3 is one of {sorted(_RATES)}, got {output_stride}")
        self.backbone = _backbone(backbone, in_channels, stem, output_stride)
        # MobileNetV2's last stage is its wide 1×1, which is gone here.
        stages = self.backbone.stages[:4]
        self.stages = tuple(f"backbone.{stage}" for stage in stages)
        self.num_features = 2048 if backbone == "resnet50" else 320
        self.pyramid = AtrousPyramid(self.num_features, _RATES[output_stride])
        self.head = _conv_bn_relu(_WIDTH, _WIDTH, 3)
        self.classifier = nn.Conv2d(_WIDTH, num_classes, 1)
        init_weights(self.pyramid)
        init_weights(self.head)
        init_weights(self.classifier)

    def forward_features(self, x: Tensor) -> Tensor:
        """The backbone's output, ``[B, num_features, ⌈H/output_stride⌉, ⌈W/output_stride⌉]``."""
        return self.backbone.forward_features(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the images' own resolution, bilinear."""
        logits = self.classifier(self.head(self.pyramid(self.forward_features(x))))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear")
