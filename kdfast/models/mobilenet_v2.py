"""MobileNetV2 (Sandler et al. 2018) for small images, half width, as CRD (Tian et al. 2020) distils it.

Differences from the ImageNet network: the second stage keeps its resolution, so that 32×32 images end in
features of 2×2; and the default width is one half (``mobilenet_v2`` with T = 6, W = 0.5). Parameter names are
the published ones.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kdfast.models.layers import ConvNet, Stem, check_stem, init_weights, plan_stages, scaled

# channels, blocks, stride of the first block; the expansion is 1 in the first stage and `expansion` after it.
_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class InvertedResidual(nn.Module):
    """1×1 to ``expansion`` times the width, depthwise 3×3, linear 1×1; plus the input where shapes allow."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, expansion: int, dilation: int = 1
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride, dilation, dilation, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', ⌈H/stride⌉, ⌈W/stride⌉]``, not activated."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


def _conv_bn_relu(in_channels: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


class MobileNetV2(ConvNet):
    """MobileNetV2 whose features are at 1/16 (``stem="cifar"``) or 1/32 (``stem="imagenet"``).

    Args:
        num_classes: Outputs of the classifier.
        width: Multiplier of every width but the last 1×1, which has 1280 channels at least.
        expansion: Expansion of the inverted residuals, T.
        in_channels: Channels of the images.
        stem: ``"imagenet"`` gives the second stage the stride 2 of the original.
        output_stride: Input pixels per feature pixel; smaller than the default (16, or 32 with the ImageNet
            stem) turns the last strides into dilations.

    Raises:
        ValueError: If ``width`` is not positive, ``expansion`` is below 1, or ``stem`` or ``output_stride``
            is none of the accepted values.
    """

    classifier_name: ClassVar[str] = "classifier.0"

    def __init__(
        self,
        num_classes: int,
        *,
        width: float = 0.5,
        expansion: int = 6,
        in_channels: int = 3,
        stem: Stem = "cifar",
        output_stride: int | None = None,
    ) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width is a positive multiplier, got {width}")
        if expansion < 1:
            raise ValueError(f"expansion is at least 1, got {expansion}")
        channels = scaled(32, width)
        self.conv1 = _conv_bn_relu(in_channels, channels, 3, 2)
        self.blocks = nn.ModuleList()
        strides = [stride for _, _, stride in _STAGES]
        strides[1] = 1 if check_stem(stem) else 2
        plans = plan_stages(2, strides, output_stride)
        for index, ((base, count, _), plan) in enumerate(zip(_STAGES, plans)):
            inputs, channels = channels, scaled(base, width)
            factor = expansion if index else 1
            stage = [InvertedResidual(inputs, channels, plan.stride, factor, plan.first_dilation)]
            for _ in range(count - 1):
                stage.append(InvertedResidual(channels, channels, 1, factor, plan.dilation))
            self.blocks.append(nn.Sequential(*stage))
        self.num_features = scaled(1280, max(1.0, width))
        self.conv2 = _conv_bn_relu(channels, self.num_features, 1, 1)
        self.classifier = nn.Sequential(nn.Linear(self.num_features, num_classes))
        # One name for each resolution, then the wide 1×1 that the classifier pools.
        self.stages = ("blocks.1", "blocks.2", "blocks.4", "blocks.6", "conv2")
        init_weights(self, linear_std=0.01)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, num_features, ⌈H/16⌉, ⌈W/16⌉]`` (1/32 with the ImageNet stem), after the last ReLU."""
        x = self.conv1(x)
        for stage in self.blocks:
            x = stage(x)
        features: Tensor = self.conv2(x)
        return features
