"""What every network here shares: a classifier's skeleton, the published initialisation, channel shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

Stem = Literal["cifar", "imagenet"]


class ConvNet(nn.Module):
    """A convolutional classifier: features, global average pooling, one linear layer.

    Images ``[B, in_channels, H, W]`` in, logits ``[B, num_classes]`` out, for any ``H`` and ``W``: nothing
    depends on the image size, because the pooling is global. The method names are timm's, so that either kind
    of network serves.

    Attributes:
        stages: Names of the modules that end each stage, shallow to deep, ready for
            :class:`~kdfast.models.taps.FeatureTaps`; the last one is what :meth:`forward_features` returns.
        num_features: Channels of :meth:`forward_features`, which is the width of the classifier's input.
    """

    classifier_name: ClassVar[str] = "fc"
    stages: tuple[str, ...]
    num_features: int

    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map before pooling, ``[B, num_features, h, w]``."""
        raise NotImplementedError

    def forward_head(self, features: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Pool a feature map and classify it; ``pre_logits`` stops at the pooled ``[B, num_features]``."""
        pooled: Tensor = self.avgpool(features).flatten(1)
        return pooled if pre_logits else self.get_classifier()(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        """The linear layer that makes the logits."""
        layer = self.get_submodule(self.classifier_name)
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"{self.classifier_name} was replaced by a {type(layer).__name__}; expected nn.Linear"
            )
        return layer


class ChannelShuffle(nn.Module):
    """Interleave blocks of ``n = C/groups`` channels: channel ``g·n + k`` goes to ``k·groups + g``."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape; ``C`` is a multiple of ``groups``."""
        batch, channels, height, width = x.shape
        blocks = x.reshape(batch, self.groups, channels // self.groups, height, width)
        return blocks.transpose(1, 2).reshape(batch, channels, height, width)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"groups={self.groups}"


def init_weights(model: nn.Module, *, linear_std: float | None = None) -> None:
    """Initialise in place: convolutions N(0, 2/fan_out) (He et al. 2015), batch norms 1 and 0, biases 0.

    Args:
        model: Whose modules to initialise.
        linear_std: Standard deviation of the linear weights; None keeps PyTorch's default for linear layers.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)


def scaled(channels: int, width: float) -> int:
    """``channels`` times a width multiplier, rounded down as the published CIFAR networks do, at least 1."""
    return max(1, int(channels * width))


def check_stem(stem: str) -> bool:
    """Whether the stem is the one for small images.

    Raises:
        ValueError: If it is neither ``"cifar"`` nor ``"imagenet"``.
    """
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f'stem is "cifar" or "imagenet", got {stem!r}')
    return stem == "cifar"


@dataclass(frozen=True)
class StagePlan:
    """How a stage samples: the stride of its first block, the dilation of that block and of the others."""

    stride: int
    first_dilation: int
    dilation: int


def plan_stages(stem_stride: int, strides: Sequence[int], output_stride: int | None) -> list[StagePlan]:
    """Turn the strides beyond ``output_stride`` into dilations (DeepLabV3, Chen et al. 2017).

    Args:
        stem_stride: Input pixels per pixel before the first stage.
        strides: Stride of each stage, 1 or 2.
        output_stride: Input pixels per pixel after the last stage; None dilates nothing.

    Raises:
        ValueError: If ``output_stride`` cannot be reached.
    """
    accepted = [stem_stride << twos for twos in range(strides.count(2) + 1)]
    if output_stride is not None and output_stride not in accepted:
        raise ValueError(f"output_stride of this network is one of {accepted}, got {output_stride}")
    limit = accepted[-1] if output_stride is None else output_stride
    plans, reached, dilation = [], stem_stride, 1
    for stride in strides:
        before = dilation
        if reached * stride <= limit:
            reached *= stride
        else:
            # The first block of the stage still reads at the spacing of the stage before it.
            dilation, stride = dilation * stride, 1
        plans.append(StagePlan(stride, before, dilation))
    return plans
