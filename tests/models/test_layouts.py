"""Where channels are: told by modules, by proportions, by the kind of network, and refused where nothing tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdfast.methods.baselines import AT
from kdfast.methods.diffkd import DiffKD, DiffKDConfig, Pair
from kdfast.methods.kdiffusion import Kdiffusion, KdiffusionConfig, Stage
from kdfast.models.layouts import layout_of


class Cnn(nn.Module):
    """Eight channels at stride 8, or as many as are asked for."""

    def __init__(self, channels: int = 8, stride: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, channels, stride, stride), nn.BatchNorm2d(channels)
        self.act, self.fc = nn.ReLU(), nn.Linear(channels, 5)

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.act(self.norm(self.stem(x))).mean((2, 3)))
        return out


class Swin(nn.Module):
    """Maps with the channels last; ``plain`` is a layer that does not say how many."""

    def __init__(self, channels: int = 12, stride: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, channels, stride, stride), nn.LayerNorm(channels)
        self.stage = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.plain, self.fc = nn.Identity(), nn.Linear(channels, 5)

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.stage(self.norm(self.stem(x).movedim(1, -1))))
        out: Tensor = self.fc(x.mean((1, 2)))
        return out


class Vit(nn.Module):
    """Tokens ``[B, 1 + N, C]`` behind a class token."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.stem, self.norm, self.fc = (
            nn.Conv2d(3, channels, 8, 8),
            nn.LayerNorm(channels),
            nn.Linear(channels, 5),
        )

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        out: Tensor = self.fc(self.norm(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))[:, 0])
        return out


IMAGES = torch.zeros(2, 3, 32, 64)


def told(network: nn.Module, layer: str, shape: tuple[int, ...], images: Any = None) -> str:
    return layout_of(network, layer, torch.zeros(shape), "auto", images)


@pytest.mark.parametrize(
    ("network", "layer", "shape", "images", "expected"),
    [
        # 64 channels at stride 8 of 512×1024 (Cityscapes): as square as Swin's maps, and not the same.
        (Cnn(64), "norm", (2, 64, 64, 128), None, "channels_first"),
        (Cnn(64), "act", (2, 64, 64, 128), None, "channels_first"),
        (Swin(128), "stage", (2, 64, 64, 128), None, "channels_last"),
        (Swin(768), "norm", (2, 16, 32, 768), None, "channels_last"),
        (Swin(768), "plain", (2, 16, 32, 768), torch.zeros(2, 3, 512, 1024), "channels_last"),
        (Swin(64), "plain", (2, 64, 64, 128), torch.zeros(2, 3, 512, 1024), "channels_first"),
        (Swin(768), "plain", (2, 7, 7, 768), torch.zeros(2, 3, 224, 224), "channels_last"),
        (Swin(256), "norm", (2, 256, 256, 256), None, "channels_last"),
        (Cnn(256), "stem", (2, 256, 256, 256), None, "channels_first"),
        (Swin(8), "fc:input", (2, 8, 8), None, "channels_first"),
    ],
)
def test_the_channels_are_found(network: Any, layer: str, shape: Any, images: Any, expected: str) -> None:
    assert told(network, layer, shape, images) == expected


def test_what_is_ambiguous_is_refused_and_what_is_said_is_taken() -> None:
    for images in (None, torch.zeros(2, 3, 64, 64)):
        with pytest.raises(
            ValueError, match=r"'plain' gave shape \(2, 8, 8, 8\), and whether .* set its layout"
        ):
            told(Swin(8), "plain", (2, 8, 8, 8), images)
    x = torch.zeros(2, 8, 8, 8)
    assert layout_of(Swin(8), "plain", x, "channels_last") == "channels_last"
    assert layout_of(Swin(8), "plain", x, "channels_first") == "channels_first"


def frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


# At stride 8 of 32×64 the map is 4×8: with 4 channels it looks like a square map of 8.
@pytest.mark.parametrize(("teacher", "layer"), [(Swin(12), "stage"), (Swin(12), "plain"), (Vit(12), "norm")])
@pytest.mark.parametrize("student", [4, 8])
def test_both_methods_read_transformers_and_maps_that_are_not_square(
    teacher: nn.Module, layer: str, student: int
) -> None:
    images = torch.randn(2, 3, 32, 32) if layer == "norm" else torch.randn(2, 3, 32, 64)
    target = torch.tensor([0, 1])
    diffkd = DiffKD(
        Cnn(student),
        frozen(teacher),
        pairs=[Pair("norm", layer)],
        config=DiffKDConfig(latent_channels=None),
        images=images,
    )
    assert diffkd.denoising["feature"].trans.in_channels == student
    assert diffkd.denoising["feature"].trans.out_channels == 12
    assert bool(diffkd.step((images, target)).isfinite())
    kdiffusion = Kdiffusion(
        Cnn(student),
        frozen(teacher),
        stages=[Stage("stem", layer, "norm")],
        images=images,
        config=KdiffusionConfig(branches=2),
    )
    assert kdiffusion.bridges[0].conv.out_channels == 12
    assert bool(kdiffusion.step((images, target)).isfinite())


def test_baselines_read_maps_that_are_not_square() -> None:
    method = AT(Cnn(4), frozen(Cnn(4)), config=AT.CONFIG(student_layers=("act",), teacher_layers=("act",)))
    method.student(IMAGES)
    method.teacher(IMAGES)
    ((own, other),) = method.features()
    assert tuple(own.shape) == tuple(other.shape) == (2, 4, 4, 8)
