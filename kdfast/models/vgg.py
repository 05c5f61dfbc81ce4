"""VGG with batch norm for small images (Simonyan & Zisserman 2015): vgg8, vgg11, vgg13 with one linear layer.

The fully connected layers of the original are gone, as in CRD (Tian et al. 2020), whose parameter names these
are.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kdfast.models.layers import ConvNet, init_weights

Widths = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]

VGG8: Widths = ((64,), (128,), (256,), (512,), (512,))
VGG11: Widths = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG13: Widths = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))


class VGG(ConvNet):
    """Five blocks of 3×3 convolutions; max-pools after the first three, so that features are at 1/8.

    Args:
        num_classes: Outputs of the classifier.
        widths: Channels of every convolution, block by block.
        in_channels: Channels of the images.
    """

    classifier_name: ClassVar[str] = "classifier"

    def __init__(self, num_classes: int, *, widths: Widths = VGG13, in_channels: int = 3) -> None:
        super().__init__()
        inputs = (in_channels, *(block[-1] for block in widths[:-1]))
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            self._block(*pair) for pair in zip(inputs, widths)
        )
        # The last ReLU of each block stands apart, so that the block's own output is the pre-activation.
        self.relu0, self.relu1, self.relu2, self.relu3, self.relu4 = (nn.ReLU() for _ in range(5))
        # Rounding up changes nothing at multiples of 8, and lets images of any size down to 1×1 through.
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.classifier = nn.Linear(widths[-1][-1], num_classes)
        self.stages = ("relu0", "relu1", "relu2", "relu3", "relu4")
        self.num_features = widths[-1][-1]
        init_weights(self, linear_std=0.01)

    @staticmethod
    def _block(in_channels: int, widths: tuple[int, ...]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in widths:
            # The biases before batch norm do nothing; they are there because published counts include them.
            layers += [nn.Conv2d(in_channels, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.ReLU()]
            in_channels = channels
        return nn.Sequential(*layers[:-1])

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, 512, ⌈H/8⌉, ⌈W/8⌉]``, after the last ReLU; from 64 pixels on, one more halving."""
        # The published networks pool a fourth time on Tiny ImageNet's 64 pixels, and only there.
        large = min(x.shape[-2:]) >= 64
        x = self.pool(self.relu0(self.block0(x)))
        x = self.pool(self.relu1(self.block1(x)))
        x = self.pool(self.relu2(self.block2(x)))
        x = self.relu3(self.block3(x))
        features: Tensor = self.relu4(self.block4(self.pool(x) if large else x))
        return features
