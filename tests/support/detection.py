"""A detector in miniature, with torchvision's manners: a neck of levels, one head for all, losses in training mode."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Neck(nn.Module):
    """Three levels, each half as large as the one before, as a dict or as a tuple."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if at == 0 else width, width, 3, 2, 1) for at in range(3))
        self.form = form

    def forward(self, x: Tensor) -> Any:
        levels = []
        for conv in self.convs:
            x = conv(x)
            levels.append(x)
        names = ("0", "1", "pool")
        return OrderedDict(zip(names, levels)) if self.form == "dict" else tuple(levels)


class Head(nn.Module):
    """One convolution of scores and one of boxes, over all levels."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.scores, self.boxes = nn.Conv2d(width, classes, 1), nn.Conv2d(width, 4, 1)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        seen = [self.act(level) for level in levels]
        return [self.scores(x) for x in seen], [self.boxes(x) for x in seen]


class Transform(nn.Module):
    """A list of images as a batch, padded to the largest; targets as they are."""

    def __init__(self, min_size: Any = (16,)) -> None:
        super().__init__()
        self.min_size, self.max_size, self.size_divisible, self.fixed_size = min_size, 64, 8, None

    def forward(self, images: list[Tensor], targets: Any) -> Any:
        height, width = (max(image.shape[at] for image in images) for at in (1, 2))
        batch = nn.Module()
        batch.tensors = torch.stack(
            [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
        )
        return batch, targets


class Detector(nn.Module):
    """Scores and boxes at every place of every level."""

    def __init__(self, width: int = 4, classes: int = 3, form: str = "dict", min_size: Any = (16,)) -> None:
        super().__init__()
        self.transform = Transform(min_size)
        self.neck, self.head = Neck(width, form), Head(width, classes)

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        if self.training and targets is None:
            raise AssertionError("targets should not be none when in training mode")
        batch, targets = self.transform(list(images), targets)
        levels = self.neck(batch.tensors)
        scores, boxes = self.head(list(levels.values()) if isinstance(levels, dict) else list(levels))
        if not self.training:
            return [{"boxes": box, "scores": score} for box, score in zip(boxes[0], scores[0])]
        return {
            "classification": torch.stack([s.square().mean() for s in scores]).sum(),
            "bbox_regression": torch.stack([b.abs().mean() for b in boxes]).sum(),
        }


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sizes, the second one without an object."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 16, 24, generator=generator), torch.randn(3, 16, 16, generator=generator)]
    boxes = torch.tensor([[2.0, 3.0, 9.0, 11.0]])
    labels = torch.tensor([1])
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return images, [{"boxes": boxes, "labels": labels}, none]


def networks(**options: Any) -> tuple[Detector, Detector]:
    """A student and its frozen teacher, the same in every call."""
    torch.manual_seed(7)
    return Detector(4, **options), Detector(6, **options).eval().requires_grad_(False)
