"""DiffKD on detectors with MMDetection's structure: the page's names, its batches, its losses, its shared layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdfast.methods import DiffKD, DiffKDConfig
from kdfast.methods.diffkd import Pair
from kdfast.models import FeatureTaps
from kdfast.training.supervised import foreground_of, own_loss
from tests.support.mmdetection import HEADS, LEVELS, batch, detector

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "methods" / "detection.md"
TABLE = {
    name: re.findall(r"`([\w.:*]+)`", cells)
    for name, cells in re.findall(r"^\| MMDetection (.*?) \|(.*)\|$", PAGE.read_text(), re.M)
}
SIZES = [(16, 24), (8, 12), (4, 6), (2, 3)]


def all_levels(place: str) -> list[str]:
    """Of a predictor a level, all of them; the page names the first."""
    return [f"{place[:-1]}{at}" for at in range(LEVELS)] if place.endswith(".0") else [place]


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    return detector(name, 4), detector(name, 6).eval().requires_grad_(False)


@pytest.mark.parametrize("name", [name for name in TABLE if "DETR" not in name])
def test_every_place_of_the_page_has_every_level(name: str) -> None:
    assert set(HEADS) == {name for name in TABLE if "DETR" not in name}
    network, given = detector(name).eval(), batch()
    places = [place for first in TABLE[name] for place in all_levels(first)]
    with FeatureTaps(network, places, every_call=True) as taps, torch.no_grad():
        network(given["inputs"])
        for first in TABLE[name]:
            levels = [x for place in all_levels(first) for x in taps.levels(place)]
            assert [tuple(x.shape[2:]) for x in levels] == SIZES, first


def pairs_of(name: str) -> list[Pair]:
    neck, scores, *boxes = TABLE[name]
    kinds = [(scores, "sigmoid"), *((place, "l1") for place in boxes)]
    return [
        Pair(neck, name="fpn"),
        *(
            Pair(place, kind="logits", distance=distance, name=place.replace(".", "_"), background_weight=0.2)
            for first, distance in kinds
            for place in all_levels(first)
        ),
    ]


@pytest.mark.parametrize("name", ["RetinaNet", "RTMDet", "Faster R-CNN"])
def test_a_step_takes_their_batch_and_sums_their_losses(name: str) -> None:
    student, teacher = networks(name)
    given = {**batch(), "mode": "loss"}
    config = DiffKDConfig(latent_channels=None)
    method = DiffKD(student, teacher, pairs=pairs_of(name), config=config, images=given)
    assert len(method.names) == LEVELS * len(TABLE[name])
    method.step(given).backward()
    torch.testing.assert_close(
        method.parts["task"].detach(), own_loss(student(**given)).detach(), rtol=1e-5, atol=0
    )
    reached = [p for p in student.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) > 10


def test_a_training_step_of_ones_own_gives_what_step_does() -> None:
    given = batch()
    totals = []
    for own in (False, True):
        student, teacher = networks("RetinaNet")
        torch.manual_seed(2)
        pairs = [pair for pair in pairs_of("RetinaNet") if pair.name == "fpn"]
        method = DiffKD(
            student, teacher, pairs=pairs, config=DiffKDConfig(latent_channels=None), images=given
        )
        torch.manual_seed(3)
        if own:
            with torch.no_grad():
                teacher(given["inputs"])
            losses = student(**given, mode="loss")
            total = own_loss(losses) + method.loss()
        else:
            total = method.step({**given, "mode": "loss"})
        totals.append(total)
    torch.testing.assert_close(*totals)


def test_the_loss_is_what_mmengine_sums() -> None:
    """``parse_losses``: each value's mean, of lists the sum of them, of what has "loss" in its name."""
    two, three = torch.tensor([2.0, 4.0]), torch.tensor(3.0)
    losses: dict[str, Any] = {"loss_cls": [three, two], "d0.loss_bbox": two, "acc": torch.tensor([90.0])}
    assert own_loss(losses).item() == 3.0 + 3.0 + 3.0
    with pytest.raises(TypeError, match="without a loss"):
        own_loss({"loss_cls": [three, None]})
    with pytest.raises(TypeError, match="mode='loss'"):
        own_loss(([three], [three]))


def test_boxes_of_their_samples_are_the_foreground() -> None:
    mask = foreground_of(batch(), [])
    assert mask.shape == (2, 32, 48)
    assert mask[0, 3:11, 2:9].all()
    assert int(mask.sum()) == 7 * 8


def test_a_layer_that_stands_in_several_places_has_each_of_their_names() -> None:
    network = detector("RTMDet").eval()
    names = [f"bbox_head.cls_convs.{at}.0.conv" for at in range(LEVELS)]
    with FeatureTaps(network, [*names, "bbox_head.cls_convs.2.0"], every_call=True) as taps, torch.no_grad():
        network(batch()["inputs"])
        for name in names:  # the same convolution: every call of it
            assert [tuple(x.shape[2:]) for x in taps.levels(name)] == SIZES
        assert tuple(taps["bbox_head.cls_convs.2.0"].shape[2:]) == SIZES[2]
