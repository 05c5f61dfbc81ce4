"""Two small networks, and batches, for the tests of DiffKD and of its baselines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdfast.methods.diffkd import DiffKD, DiffKDConfig, Pair

SMALL = {"latent_channels": 8}


class Net(nn.Module):
    """A convolution of stride 2, one of stride 1, and a classifier."""

    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, classes)
        self.stages = ("stem", "last")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.stem(x)).mean((2, 3)))


def batch(count: int = 4, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.randint(5, (count,), generator=generator)


def networks() -> tuple[Net, Net]:
    """A student and its frozen teacher, the same in every call."""
    state = torch.random.get_rng_state()
    torch.manual_seed(7)
    student, teacher = Net(4), Net(6).eval().requires_grad_(False)
    torch.random.set_rng_state(state)
    return student, teacher


def make(
    *pairs: Pair, student: nn.Module | None = None, teacher: nn.Module | None = None, **config: Any
) -> DiffKD:
    """The method on the small networks, with the same weights in every call."""
    own, other = networks()
    torch.manual_seed(3)
    return DiffKD(
        student or own,
        teacher or other,
        pairs=pairs or None,
        config=DiffKDConfig(**{**SMALL, **config}),
        images=batch()[0],
    )


def gradients(method: nn.Module) -> dict[str, Tensor]:
    """Of every parameter; 0 where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in method.named_parameters()}
