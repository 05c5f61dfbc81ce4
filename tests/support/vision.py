"""torchvision's detectors in miniature, drawn shapes to train them on, and their average precision."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CLASSES = 3
SIZE = 64
Boxed = tuple[list[Tensor], list[dict[str, Tensor]]]


def torchvision() -> Any:
    """The package, or a skipped test: it may be missing, or made for another torch than the one here."""
    try:
        return importlib.import_module("torchvision")
    except Exception as error:  # a wrong build raises whatever its operators meet
        pytest.skip(f"torchvision does not import here: {error}; make test-vision has an environment for it")


def fcos(width: int) -> nn.Module:
    """FCOS on four small stages, the first ``width`` wide, and a pyramid of three levels and the last one pooled."""
    torchvision()
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    stages = nn.Sequential()
    for at, (before, after) in enumerate(((3, 1), (1, 1), (1, 2), (2, 4))):
        channels = (3 if at == 0 else before * width, after * width)
        stages.append(
            nn.Sequential(nn.Conv2d(*channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels[1]), nn.ReLU())
        )
    backbone = BackboneWithFPN(
        stages, {"1": "0", "2": "1", "3": "2"}, [width, 2 * width, 4 * width], 32, extra_blocks=None
    )
    anchors = AnchorGenerator(sizes=((4,), (8,), (16,), (32,)), aspect_ratios=((1.0,),) * 4)
    return FCOS(
        backbone,
        num_classes=CLASSES,
        min_size=SIZE,
        max_size=SIZE,
        anchor_generator=anchors,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )


def shapes(count: int, seed: int) -> Boxed:
    """Pictures of noise with one to three discs, squares and crosses, and their boxes."""
    rng = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images, targets = [], []
    for _ in range(count):
        image = 0.5 + 0.12 * torch.randn(3, SIZE, SIZE, generator=rng)
        boxes, labels = [], []
        for _ in range(int(torch.randint(1, 4, (1,), generator=rng))):
            half = int(torch.randint(5, 13, (1,), generator=rng))
            y, x = (int(torch.randint(half, SIZE - half, (1,), generator=rng)) for _ in range(2))
            box = [x - half, y - half, x + half, y + half]
            if any(
                min(box[2], b[2]) > max(box[0], b[0]) and min(box[3], b[3]) > max(box[1], b[1]) for b in boxes
            ):
                continue
            kind = int(torch.randint(CLASSES, (1,), generator=rng))
            down, right = (rows - y).abs(), (columns - x).abs()
            inside = {
                0: down**2 + right**2 <= half**2,
                1: torch.maximum(down, right) <= half,
                2: (torch.minimum(down, right) <= half // 3) & (torch.maximum(down, right) <= half),
            }[kind]
            colour = torch.rand(3, 1, generator=rng)
            image[:, inside] = 0.6 * image[:, inside] + 0.4 * colour
            boxes.append(box)
            labels.append(kind)
        images.append(image.clamp(0, 1))
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
    return images, targets


@torch.no_grad()
def mean_average_precision(detector: nn.Module, boxed: Boxed, *, overlap: float = 0.5) -> float:
    """The area under precision over recall (interpolated at every recall, as COCO's), mean over classes."""
    from torchvision.ops import box_iou

    images, targets = boxed
    was = detector.training
    found = detector.eval()(images)
    detector.train(was)
    areas = []
    for kind in range(CLASSES):
        scored, total = [], 0
        for out, target in zip(found, targets):
            true = target["boxes"][target["labels"] == kind]
            total += len(true)
            mine = out["labels"] == kind
            order = out["scores"][mine].argsort(descending=True)
            taken: set[int] = set()
            for box, score in zip(out["boxes"][mine][order], out["scores"][mine][order]):
                hit = False
                if len(true):
                    best, at = box_iou(box[None], true)[0].max(0)
                    hit = float(best) >= overlap and int(at) not in taken
                    if hit:
                        taken.add(int(at))
                scored.append((float(score), hit))
        scored.sort(key=lambda pair: -pair[0])
        hits = torch.tensor([hit for _, hit in scored], dtype=torch.float64)
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        recall = hits.cumsum(0) / max(total, 1)
        # What is reached at this recall or a later one.
        envelope = precision.flip(0).cummax(0).values.flip(0) if len(precision) else precision
        steps = torch.diff(recall, prepend=torch.zeros(1, dtype=torch.float64))
        areas.append(float((envelope * steps).sum()))
    return sum(areas) / len(areas)
