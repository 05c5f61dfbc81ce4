"""Blocks of the documentation that need torchvision, timm or 🤗 Transformers, and the layer names that it lists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.models import FeatureTaps
from tests.support.vision import torchvision

pytestmark = pytest.mark.slow

PAGES = Path(__file__).parents[2] / "docs" / "pages"
#: ``py`` instead of ``python``: the tests of the other pages leave these out. Those of adapters.md are for the reader's
#: own networks and data; tests/adapters runs what they show inside of the trainers.
FENCE = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(match[1], id=f"{page.stem}-{at}")
    for page in sorted((PAGES / "methods").glob("*.md"))
    for at, match in enumerate(FENCE.finditer(page.read_text()))
]
SMALL = {"weights": None, "weights_backbone": None, "min_size": 96, "max_size": 96}


@pytest.mark.parametrize("code", BLOCKS)
def test_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "page", "exec"), {"__name__": "__main__"})


def rows() -> dict[str, list[str]]:
    """Places by detector, of the page's table."""
    table = re.findall(
        r"^\| ((?:torchvision|🤗) .*?) \|(.*)\|$", (PAGES / "methods" / "detection.md").read_text(), re.M
    )
    names = {who: re.findall(r"`([\w.:*#]+)`", cells) for who, cells in table}
    assert len(names) >= 6
    return names


@pytest.mark.parametrize(
    ("detector", "made"),
    [
        ("torchvision RetinaNet", "retinanet_resnet50_fpn"),
        ("torchvision FCOS", "fcos_resnet50_fpn"),
        ("torchvision Faster and Mask R-CNN", "fasterrcnn_resnet50_fpn"),
        ("torchvision Faster and Mask R-CNN", "maskrcnn_resnet50_fpn"),
    ],
)
def test_names_of_torchvisions_detectors(detector: str, made: str) -> None:
    torchvision()
    from torchvision.models import detection

    network: Any = getattr(detection, made)(**SMALL).eval()
    places = rows()[detector]
    assert len(places) >= 3
    with FeatureTaps(network, places, every_call=True) as taps, torch.no_grad():
        network([torch.rand(3, 96, 96)])
        assert all(len(taps.levels(place)) == 5 for place in places)


def test_names_of_ssd() -> None:
    torchvision()
    from torchvision.models import detection

    network = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    with FeatureTaps(network, rows()["torchvision SSD, SSDlite"]) as taps, torch.no_grad():
        network([torch.rand(3, 96, 96)])
        assert len(taps.levels("backbone:*")) == 6


def test_names_of_yolos() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 96],
        num_labels=3,
        use_mid_position_embeddings=False,
    )
    network = transformers.YolosForObjectDetection(config).eval()
    (place,) = rows()["🤗 YOLOS"][:1]
    with FeatureTaps(network, [place]) as taps, torch.no_grad():
        network(torch.rand(1, 3, 64, 96))
        assert taps[place].shape[1] == 1 + 4 * 6 + 100  # as (1, -100) cuts them


def test_names_of_rt_detr() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RTDetrConfig(num_queries=10, decoder_layers=1, use_pretrained_backbone=False)
    network = transformers.RTDetrForObjectDetection(config).eval()
    places = [f"model.decoder_input_proj.{at}" for at in range(3)]
    assert rows()["🤗 RT-DETR"][0] == places[0]
    with FeatureTaps(network, places) as taps, torch.no_grad():
        network(torch.rand(1, 3, 64, 96))
        assert [tuple(x.shape[2:]) for _, x in taps.items()] == [(8, 12), (4, 6), (2, 3)]
