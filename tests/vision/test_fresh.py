"""Networks without pretrained weights are made without a network connection."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch

from kdfast.models import create_model
from tests.support.vision import torchvision

pytestmark = pytest.mark.slow


def test_fresh_networks_download_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    models: Any = torchvision().models

    def refuse(url: str, *_: object, **__: object) -> NoReturn:
        raise AssertionError(f"fetched {url}")

    for name in ("load_state_dict_from_url", "download_url_to_file"):
        monkeypatch.setattr(torch.hub, name, refuse)
    for name in (
        "deeplabv3_resnet50",
        "lraspp_mobilenet_v3_large",
        "ssdlite320_mobilenet_v3_large",
        "resnet18",
    ):
        assert name in models.list_models()
        assert sum(p.numel() for p in create_model(f"torchvision:{name}", 5).parameters()) > 1_000_000
