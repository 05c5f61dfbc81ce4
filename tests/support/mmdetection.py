"""Detectors with MMDetection 3's structure and names, in miniature: its necks, its dense heads, its three modes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 4


class ConvModule(nn.Module):
    """mmcv's: a convolution, a norm, and an activation that works in place."""

    def __init__(self, before: int, after: int, kernel: int = 3, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(after) if norm else nn.Identity()
        self.activate = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.bn(self.conv(x)))


class Scale(nn.Module):
    """mmcv's: a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Backbone(nn.Module):
    """A tuple of three maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ConvModule(3 if at == 0 else width * 2 ** (at - 1), width * 2**at, stride=2) for at in range(3)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return tuple(maps)


class FPN(nn.Module):
    """A tuple of as many levels, and one more by max-pooling, which is no module."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(width * 2**at, channels, 1) for at in range(3))
        self.fpn_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        for at in (2, 1):
            laterals[at - 1] = laterals[at - 1] + F.interpolate(laterals[at], laterals[at - 1].shape[2:])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals)]
        return (*outs, F.max_pool2d(outs[-1], 1, stride=2))


def multi_apply(function: Any, *lists: Any) -> tuple[list[Any], ...]:
    """mmdet's: over levels; a list of each output."""
    return tuple(map(list, zip(*map(function, *lists))))


class Shared(nn.Module):
    """RetinaHead, ATSSHead, FCOSHead, GFLHead, RepPointsHead, RPNHead: predictors that all levels share."""

    def __init__(self, channels: int, predictors: dict[str, int], scaled: str | None = None) -> None:
        super().__init__()
        self.cls_convs = nn.ModuleList([ConvModule(channels, channels)])
        for name, count in predictors.items():
            setattr(self, name, nn.Conv2d(channels, count, 3, padding=1))
        self.predictors, self.scaled = tuple(predictors), scaled
        self.scales = nn.ModuleList(Scale() for _ in range(LEVELS))

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[list[Tensor], ...]:
        return multi_apply(self.forward_single, levels, self.scales)

    def forward_single(self, x: Tensor, scale: nn.Module) -> tuple[Tensor, ...]:
        x = self.cls_convs[0](x)
        out = {name: getattr(self, name)(x) for name in self.predictors}
        if self.scaled:
            out[self.scaled] = scale(out[self.scaled]).float()
        return tuple(out.values())


class PerLevel(nn.Module):
    """YOLOXHead, SSDHead, YOLOV3Head, RTMDetSepBNHead: predictors of its own for each level.

    RTMDet's towers have a norm a level and one convolution for all, which stands in each.
    """

    def __init__(self, channels: int, predictors: dict[str, int], tower: str | None = None) -> None:
        super().__init__()
        self.predictors, self.tower = tuple(predictors), tower
        if tower is not None:
            towers = nn.ModuleList(nn.ModuleList([ConvModule(channels, channels)]) for _ in range(LEVELS))
            for level in towers:
                level[0].conv = towers[0][0].conv
            self.add_module(tower, towers)
        for name, count in predictors.items():
            self.add_module(name, nn.ModuleList(nn.Conv2d(channels, count, 1) for _ in range(LEVELS)))

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[list[Tensor], ...]:
        return multi_apply(self.forward_single, levels, range(LEVELS))

    def forward_single(self, x: Tensor, at: int) -> tuple[Tensor, ...]:
        if self.tower is not None:
            x = getattr(self, self.tower)[at][0](x)
        return tuple(getattr(self, name)[at](x) for name in self.predictors)


class Detector(nn.Module):
    """``forward(inputs, data_samples, mode)``, as mmdet's SingleStageDetector has it."""

    def __init__(self, head: str, kind: type[nn.Module], width: int, **options: Any) -> None:
        super().__init__()
        self.backbone, self.neck = Backbone(width), FPN(width, 2 * width)
        self.add_module(head, kind(2 * width, **options))
        self.head = head

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        outs = getattr(self, self.head)(self.neck(self.backbone(inputs)))
        if mode == "tensor":
            return outs
        assert mode == "loss"
        assert data_samples is not None
        scores, boxes = outs[0], outs[-1]
        return {
            "loss_cls": [score.square().mean() for score in scores],
            "loss_bbox": torch.stack([box.abs().mean() for box in boxes]).sum(),
            "acc": torch.tensor([55.0]),
        }


#: The head's name, its kind, and its predictors, by detector of the page's table.
HEADS: dict[str, tuple[str, type[nn.Module], dict[str, Any]]] = {
    "RetinaNet": ("bbox_head", Shared, {"predictors": {"retina_cls": 6, "retina_reg": 8}}),
    "ATSS": (
        "bbox_head",
        Shared,
        {"predictors": {"atss_cls": 3, "atss_reg": 4, "atss_centerness": 1}, "scaled": "atss_reg"},
    ),
    "FCOS": (
        "bbox_head",
        Shared,
        {"predictors": {"conv_cls": 3, "conv_reg": 4, "conv_centerness": 1}, "scaled": "conv_reg"},
    ),
    "GFL": ("bbox_head", Shared, {"predictors": {"gfl_cls": 3, "gfl_reg": 4 * 17}, "scaled": "gfl_reg"}),
    "RepPoints": (
        "bbox_head",
        Shared,
        {
            "predictors": {
                "reppoints_cls_out": 3,
                "reppoints_pts_init_out": 18,
                "reppoints_pts_refine_out": 18,
            }
        },
    ),
    "Faster R-CNN": ("rpn_head", Shared, {"predictors": {"rpn_cls": 3, "rpn_reg": 12}}),
    "YOLOX": (
        "bbox_head",
        PerLevel,
        {
            "predictors": {
                "multi_level_conv_cls": 3,
                "multi_level_conv_reg": 4,
                "multi_level_conv_obj": 1,
            }
        },
    ),
    "RTMDet": ("bbox_head", PerLevel, {"predictors": {"rtm_cls": 3, "rtm_reg": 4}, "tower": "cls_convs"}),
    "SSD": ("bbox_head", PerLevel, {"predictors": {"cls_convs": 4, "reg_convs": 4}}),
    "YOLOv3": ("bbox_head", PerLevel, {"predictors": {"convs_pred": 8}}),
}


def detector(name: str, width: int = 4) -> Detector:
    """One of :data:`HEADS`."""
    head, kind, options = HEADS[name]
    return Detector(head, kind, width, **options)


def batch() -> dict[str, Any]:
    """What mmdet's ``data_preprocessor`` gives: two images, one with a box, one without."""
    generator = torch.Generator().manual_seed(0)
    boxes = [torch.tensor([[2.0, 3.0, 9.0, 11.0]]), torch.zeros(0, 4)]
    # mmdet's boxes are a class around a tensor, or a tensor.
    around = [SimpleNamespace(tensor=boxes[0]), boxes[1]]
    samples = [SimpleNamespace(gt_instances=SimpleNamespace(bboxes=found)) for found in around]
    return {"inputs": torch.randn(2, 3, 32, 48, generator=generator), "data_samples": samples}
