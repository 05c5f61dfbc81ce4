"""Small networks, and a whole run of SSD-KD as one vector of numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdfast.methods import SSDKD, SSDKDConfig

SHAPE, CLASSES = (3, 8, 8), 4
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)

#: Settings that take milliseconds a round.
TINY: dict[str, Any] = {
    "capacity": 12,
    "fill_epochs": 1,
    "kd_steps": 2,
    "synthesis_batch": 6,
    "inversion_steps": 2,
    "latent": 5,
    "generator_width": 4,
    "upsamplings": 1,
    "padding": 1,
}


class Net(nn.Module):
    """Two convolutions with batch norm, and a linear layer; ``pixels`` classifies each pixel instead."""

    def __init__(self, width: int = 6, *, pixels: bool = False, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.pixels = pixels
        self.head: nn.Module = nn.Conv2d(width, classes, 1) if pixels else nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        out: Tensor = self.head(x if self.pixels else x.mean((2, 3)))
        return out

    def get_classifier(self) -> nn.Module:
        return self.head


def trained(seed: int, *, pixels: bool = False, scale: float = 4.0) -> Net:
    """A network with statistics that are not the initial ones, and predictions that are not all alike."""
    torch.manual_seed(seed)
    net = Net(pixels=pixels)
    with torch.no_grad():
        for norm in (net.norm1, net.norm2):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 1.5)
        net.head.weight.mul_(scale)
    return net


def frozen(teacher: Net) -> Net:
    """As a teacher has to be."""
    return teacher.eval().requires_grad_(False)


def method(
    *, pixels: bool = False, batch_size: int = 8, seed: int = 0, device: str = "cpu", **values: Any
) -> SSDKD:
    """A method of tiny settings with a student."""
    teacher, student = trained(1, pixels=pixels), trained(1, pixels=pixels)
    with torch.no_grad():  # a student that agrees with its teacher here and there
        for parameter in student.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    config = SSDKDConfig(**{**TINY, **values})
    return SSDKD(
        student.to(device),
        frozen(teacher).to(device),
        config=config,
        image_shape=SHAPE,
        mean=MEAN,
        std=STD,
        batch_size=batch_size,
        seed=seed,
    )


def run(made: SSDKD, rounds: int, *, lr: float = 0.05) -> Tensor:
    """Go on for some rounds; everything that happened, as float64 numbers."""
    student = made.student
    assert student is not None
    optimizer = torch.optim.SGD(student.parameters(), lr=lr)
    seen = []
    for _ in range(rounds):
        seen.append(made.synthesize().double().flatten())
        for _ in range(made.steps if made.ready else 0):
            loss = made.step()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach().double().view(1))
    return torch.cat(seen)


def trajectory(rounds: int = 4, **values: Any) -> Tensor:
    """A whole run from scratch."""
    return run(method(**values), rounds)
