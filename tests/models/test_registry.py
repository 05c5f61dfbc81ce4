"""Networks by name: what the registry understands and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

from kdfast.errors import MissingExtraError
from kdfast.models import create_model, list_models


def test_list_models_is_in_natural_order_and_filters() -> None:
    assert list_models("resnet?") == ["resnet8"]
    names = list_models()
    assert names.index("resnet8") < names.index("resnet14") < names.index("resnet110")


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("ShuffleV1", "shufflenet_v1"),
        ("shufflenet-v2", "shufflenet_v2"),
        ("MobileNetV2", "mobilenet_v2"),
        ("vgg13_bn", "vgg13"),
        ("ResNet50", "resnet50"),
        ("wrn40_2", "wrn_40_2"),
    ],
)
def test_other_spellings(alias: str, name: str) -> None:
    with torch.device("meta"):
        built, expected = create_model(alias, 10).state_dict(), create_model(name, 10).state_dict()
    assert {key: value.shape for key, value in built.items()} == {k: v.shape for k, v in expected.items()}


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet2O'.*resnet20"):
        create_model("resnet2O", 10)
    with pytest.raises(ValueError, match=r"unknown model 'zzz'; known: deeplabv3_mobilenet_v2, .*wrn_40_2"):
        create_model("zzz", 10)


@pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
def test_sizes_below_one_and_other_types_are_refused(argument: str) -> None:
    arguments = {"num_classes": 10, "in_channels": 3}
    for value, error in ((0, ValueError), ("10", TypeError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match=argument):
            create_model("resnet8", **{**arguments, argument: value})


def test_unknown_option_names_the_accepted_ones() -> None:
    with pytest.raises(TypeError, match=r"'resnet18' has no option 'stam'; it accepts stem, output_stride"):
        create_model("resnet18", 10, stam="imagenet")
    with pytest.raises(TypeError, match="'depth'"):
        create_model("resnet20", 10, depth=32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"stem": "big"}, "stem"),
        ("resnet18", {"output_stride": 3}, "output_stride"),
        ("wrn_17_2", {}, "6n \\+ 4"),
        ("wrn_16_0", {}, "at least 1"),
        ("wrn_16_1", {"dropout": 1.0}, "dropout"),
        ("resnet20", {"widths": (16, 16)}, "widths"),
        ("mobilenet_v1", {"width": 0.0}, "width"),
        ("mobilenet_v1", {"stem": "big"}, "stem"),
        ("mobilenet_v2", {"width": 0.0}, "width"),
        ("mobilenet_v2", {"output_stride": 64}, "output_stride"),
        ("mobilenet_v2", {"expansion": 0}, "expansion"),
        ("mobilenet_v2", {"stem": "big"}, "stem"),
        ("shufflenet_v1", {"groups": 5}, "groups"),
        ("shufflenet_v2", {"size": 3}, "size"),
        ("shufflenet_v2", {"stem": "big"}, "stem"),
        ("deeplabv3_resnet50", {"output_stride": 32}, r"output_stride of DeepLabV3 is one of \[8, 16\]"),
        ("deeplabv3_resnet50", {"stem": "big"}, "stem"),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, 10, **options)


class _FakeTimm(ModuleType):
    """Stands in for timm, which does not import beside the CPU build of torch."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.calls: list[tuple[str, dict[str, object]]] = []

    def create_model(self, name: str, **options: object) -> nn.Module:
        if name not in self.list_models():
            raise RuntimeError(f"Unknown model ({name})")
        if options.get("fail"):
            raise RuntimeError("out of memory")
        self.calls.append((name, options))
        return nn.Identity()

    def list_models(self) -> list[str]:
        return ["swin_tiny", "vit_base"]


def test_timm_names_go_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = _FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert isinstance(create_model("timm:swin_tiny", 12, in_channels=1, pretrained=True), nn.Identity)
    assert timm.calls == [("swin_tiny", {"num_classes": 12, "in_chans": 1, "pretrained": True})]
    with pytest.raises(ValueError, match="timm has no model 'swin_tine'; did you mean timm:swin_tiny"):
        create_model("timm:swin_tine", 12)
    with pytest.raises(RuntimeError, match="out of memory"):
        create_model("timm:swin_tiny", 12, fail=True)


def test_timm_missing_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"kdfast\[models\]"):
        create_model("timm:resnet18", 10)


class _FakeTorchvision(ModuleType):
    """Stands in for torchvision.models, which does not import beside the CPU build of torch."""

    def __init__(self) -> None:
        super().__init__("torchvision.models")
        self.calls: list[tuple[str, dict[str, object]]] = []

    def list_models(self) -> list[str]:
        return ["deeplabv3_resnet50", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0"]

    def get_model_builder(self, name: str) -> Callable[..., nn.Module]:
        def segmenter(*, weights: object = None, weights_backbone: object = "V1") -> nn.Module: ...

        def classifier(*, weights: object = None) -> nn.Module: ...

        return segmenter if name.startswith("deeplab") else classifier

    def get_model(self, name: str, **options: object) -> nn.Module:
        self.calls.append((name, options))
        return nn.Identity()


def test_torchvision_names_go_to_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    models = _FakeTorchvision()
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    create_model("torchvision:shufflenet_v2_x1_0", 1000, pretrained=True)
    create_model("torchvision:shufflenet_v2_x0_5", 7)
    assert models.calls == [
        ("shufflenet_v2_x1_0", {"weights": "IMAGENET1K_V1", "num_classes": 1000}),
        ("shufflenet_v2_x0_5", {"weights": None, "num_classes": 7}),
    ]
    models.calls.clear()
    create_model("torchvision:deeplabv3_resnet50", 21)
    create_model("torchvision:deeplabv3_resnet50", 21, weights_backbone="V2")
    fresh: dict[str, object] = {"weights": None, "num_classes": 21}
    assert [options for _, options in models.calls] == [
        fresh | {"weights_backbone": None},  # or torchvision would fetch those
        fresh | {"weights_backbone": "V2"},
    ]
    with pytest.raises(
        ValueError, match=r"torchvision has no model .*; did you mean torchvision:shufflenet_v2"
    ):
        create_model("torchvision:shufflenet_v2", 10)
    with pytest.raises(ValueError, match="its weights for 1000 classes; got 3 and 10"):
        create_model("torchvision:shufflenet_v2_x1_0", 10, pretrained=True)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(MissingExtraError, match=r"kdfast\[models\]"):
        create_model("torchvision:shufflenet_v2_x1_0", 10)
