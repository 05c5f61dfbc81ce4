"""DeepLabV3: shapes, strides, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kdfast.models import FeatureTaps, create_model
from kdfast.models.deeplab import AtrousPyramid, DeepLabV3

NAMES = ["deeplabv3_resnet50", "deeplabv3_mobilenet_v2"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("stem", "output_stride", "sides"),
    [("imagenet", 16, (5, 3)), ("imagenet", 8, (9, 5)), ("cifar", 8, (9, 5))],
)
def test_logits_have_the_images_resolution(name: str, stem: str, output_stride: int, sides: tuple) -> None:
    with torch.device("meta"):
        model = create_model(name, 5, in_channels=2, stem=stem, output_stride=output_stride)
        x = torch.empty(2, 2, 65, 40)
        assert model(x).shape == (2, 5, 65, 40)
        with FeatureTaps(model, model.stages) as taps:
            features = model.forward_features(x)
            assert features.shape == (2, model.num_features, *sides)
            assert taps[model.stages[-1]].shape == features.shape


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_used_is_in_the_state_dict(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 3)
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_rates_double_with_the_resolution() -> None:
    rates = {}
    for stride in (8, 16):
        with torch.device("meta"):
            pyramid = create_model("deeplabv3_mobilenet_v2", 3, output_stride=stride).pyramid
        rates[stride] = [branch[0].dilation[0] for branch in pyramid.branches]
    assert rates == {16: [1, 6, 12, 18], 8: [1, 12, 24, 36]}


def test_the_image_branch_carries_the_global_mean() -> None:
    pyramid = AtrousPyramid(4, (1, 2, 3)).eval()
    for branch in pyramid.branches:
        torch.nn.init.zeros_(branch[0].weight)
    x = torch.randn(1, 4, 6, 5)
    out = pyramid(x)
    assert out.shape == (1, 256, 6, 5)
    torch.testing.assert_close(out, out[..., :1, :1].expand_as(out))
    swapped = pyramid(x.flip(-1))
    torch.testing.assert_close(out, swapped)


def test_it_learns_a_half_and_half_picture() -> None:
    model = create_model("deeplabv3_mobilenet_v2", 2, stem="cifar", output_stride=8)
    images = torch.rand(4, 3, 32, 32) * 0.1
    target = torch.zeros(4, 32, 32, dtype=torch.int64)
    target[:, :, 16:] = 1
    images[:, 0] += target
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(12):
        loss = F.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Chance is 0.5; 0.964 … 0.996 over 11 seeds and 4 roundings, 17 runs.
    assert (model(images).argmax(1) == target).float().mean() > 0.75


def test_a_batch_of_one_is_refused_in_training_and_served_in_eval() -> None:
    model = create_model("deeplabv3_mobilenet_v2", 3)
    with pytest.raises(ValueError, match="at least two images"):
        model(torch.rand(1, 3, 32, 32))
    assert model.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_unknown_backbone() -> None:
    with pytest.raises(ValueError, match="backbone is"):
        DeepLabV3(3, backbone="vgg")
