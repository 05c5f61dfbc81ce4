"""A small classifier whose pooled features are two numbers, so that everything it knows can be drawn in the plane.

Source: "What Makes a Good Dataset for Knowledge Distillation?", the network of Fig. 2: three convolutions, two globally
averaged features, three fully connected layers with ReLUs.
"""

from __future__ import annotations

from torch import Tensor, nn

from kdfast.models.layers import ConvNet, init_weights


class Gap2(ConvNet):
    """Three convolutions to two features, three linear layers from them to the logits.

    Args:
        num_classes: Outputs of the classifier.
        width: Channels of the first convolution; the second has twice as many.
        hidden: Width of the linear layers between.
        in_channels: Channels of the images.

    Raises:
        ValueError: If a width is not positive.
    """

    def __init__(self, num_classes: int, *, width: int = 16, hidden: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        if width < 1 or hidden < 1:
            raise ValueError(f"width and hidden are at least 1, got {width} and {hidden}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.relu2 = nn.ReLU()
        # Neither norm nor ReLU: the features use the whole plane.
        self.conv3 = nn.Conv2d(2 * width, 2, 3, 2, 1)
        self.hidden = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.fc = nn.Linear(hidden, num_classes)
        self.stages = ("relu1", "relu2", "conv3")
        self.num_features = 2
        init_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, 2, ⌈H/4⌉, ⌈W/4⌉]``."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        features: Tensor = self.conv3(x)
        return features

    def forward_head(self, features: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Pool a feature map and classify it; ``pre_logits`` stops at the two pooled features ``[B, 2]``."""
        pooled: Tensor = self.avgpool(features).flatten(1)
        if pre_logits:
            return pooled
        logits: Tensor = self.fc(self.hidden(pooled))
        return logits
