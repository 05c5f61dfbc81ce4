"""The networks: what they compute, what they weigh, and what the registry refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.data.datasets import load_dataset
from kdfast.models import FeatureTaps, create_model, list_models
from kdfast.models.layers import ChannelShuffle, ConvNet
from kdfast.models.mobilenet_v2 import InvertedResidual
from kdfast.models.resnet import Bottleneck
from kdfast.models.shufflenet import ShuffleDownV2, ShuffleUnitV1, ShuffleUnitV2

# Parameters with 100 classes. The integers follow from the code published with contrastive representation
# distillation (RepDistiller, which mdistiller shares); the millions are what tables print.
PUBLISHED = {
    "resnet8": (83_892, "0.08"),
    "resnet14": (181_108, "0.18"),
    "resnet20": (278_324, "0.28"),
    "resnet32": (472_756, "0.47"),
    "resnet44": (667_188, "0.67"),
    "resnet56": (861_620, "0.86"),
    "resnet110": (1_736_564, "1.74"),
    "resnet8x4": (1_233_540, "1.23"),
    "resnet32x4": (7_433_860, "7.43"),
    "resnet18": (11_220_132, "11.22"),
    "resnet34": (21_328_292, "21.33"),
    "resnet50": (23_705_252, "23.71"),
    "wrn_16_1": (180_916, "0.18"),
    "wrn_16_2": (703_284, "0.70"),
    "wrn_40_1": (569_780, "0.57"),
    "wrn_40_2": (2_255_156, "2.26"),
    "vgg8": (3_965_028, "3.97"),
    "vgg11": (9_277_284, "9.28"),
    "vgg13": (9_462_180, "9.46"),
    "mobilenet_v2": (812_836, "0.81"),
    "shufflenet_v1": (949_258, "0.95"),
    "shufflenet_v2": (1_355_528, "1.36"),
}
SMALL = ["resnet8", "wrn_16_1", "mobilenet_v1", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2"]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def meta(name: str, num_classes: int = 100, **options: object) -> nn.Module:
    # No storage and no initialisation: building all of them for real would take seconds.
    with torch.device("meta"):
        return create_model(name, num_classes, **options)


# Well-known counts of the ImageNet forms: the papers' rounded figures, and torchvision's exact ones.
IMAGENET = [
    # He et al. 2016: 11.7M and 25.6M.
    ("resnet18", 1000, {"stem": "imagenet"}, 11_689_512),
    ("resnet50", 1000, {"stem": "imagenet"}, 25_557_032),
    # Howard et al. 2017, Table 4: 4.2M.
    ("mobilenet_v1", 1000, {"stem": "imagenet"}, 4_231_976),
    # Sandler et al. 2018, Table 4: 3.4M; torchvision's 3,504,872 leaves out the 1x1 expansion of the first stage,
    # which the published CIFAR code has: 32·32 weights and 2·32.
    ("mobilenet_v2", 1000, {"stem": "imagenet", "width": 1.0}, 3_504_872 + 32 * 32 + 2 * 32),
    # Ma et al. 2018: 2.3M.
    ("shufflenet_v2", 1000, {"stem": "imagenet"}, 2_278_604),
    # torchvision's 42,004,074 with 21 classes, less its auxiliary head: 3x3 and 1x1 convolutions and a batch norm.
    ("deeplabv3_resnet50", 21, {}, 42_004_074 - (1024 * 256 * 9 + 2 * 256 + 256 * 21 + 21)),
]


def test_every_listed_model_has_a_published_count() -> None:
    others = {name for name, *_ in IMAGENET} | {"deeplabv3_mobilenet_v2", "gap2"}
    assert set(list_models()) == set(PUBLISHED) | others


@pytest.mark.parametrize(("name", "classes", "options", "expected"), IMAGENET)
def test_imagenet_forms_have_their_well_known_counts(name, classes, options, expected) -> None:
    assert count(meta(name, classes, **options)) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    exact, millions = PUBLISHED[name]
    assert count(meta(name)) == exact
    assert f"{exact / 1e6:.2f}" == millions


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110])
def test_cifar_resnet_counts_follow_from_the_layer_table(depth: int) -> None:
    # He et al. 2016, section 4.2: n blocks of two 3x3 convolutions a stage, plus two projections.
    n = (depth - 2) // 6
    convolution = lambda i, o, k: i * o * k * k + 2 * o  # noqa: E731  (its batch norm has a scale and a shift)
    total = convolution(3, 16, 3) + 64 * 100 + 100
    for i, o in ((16, 16), (16, 32), (32, 64)):
        total += (
            convolution(i, o, 3)
            + (2 * n - 1) * convolution(o, o, 3)
            + (convolution(i, o, 1) if i != o else 0)
        )
    assert count(meta(f"resnet{depth}")) == total


def test_wrn_by_pattern() -> None:
    # Zagoruyko & Komodakis 2016, Table 5: WRN-28-10 has 36.5M parameters (with 10 classes).
    assert round(count(meta("wrn-28-10", 10)) / 1e6, 1) == 36.5
    assert count(meta("WRN-40-2")) == PUBLISHED["wrn_40_2"][0]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("resnet20", ["conv1.weight", "layer1.0.bn2.running_var", "layer2.0.downsample.0.weight", "fc.bias"]),
        ("resnet18", ["layer4.1.conv2.weight", "layer2.0.shortcut.1.weight", "linear.weight"]),
        (
            "wrn_16_2",
            ["block1.layer.0.convShortcut.weight", "block3.layer.1.bn1.weight", "bn1.bias", "fc.weight"],
        ),
        ("vgg13", ["block0.0.bias", "block0.3.weight", "block4.4.running_mean", "classifier.weight"]),
        (
            "mobilenet_v2",
            ["conv1.0.weight", "blocks.1.0.conv.7.weight", "conv2.1.bias", "classifier.0.weight"],
        ),
        ("shufflenet_v1", ["layer1.0.conv1.weight", "layer3.3.bn3.bias", "linear.weight"]),
        ("shufflenet_v2", ["layer1.0.conv5.weight", "layer2.7.bn3.weight", "conv2.weight", "linear.bias"]),
    ],
)
def test_parameter_names_are_those_of_published_checkpoints(name: str, keys: list[str]) -> None:
    assert set(keys) <= set(meta(name).state_dict())


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (8, 8), (15, 17), (5, 9), (64, 64)])
@pytest.mark.parametrize("name", [*SMALL, "resnet8x4", "vgg8", "resnet18"])
def test_images_of_any_size(name: str, size: tuple[int, int]) -> None:
    model = meta(name, 7, in_channels=1)
    with torch.device("meta"):
        assert model(torch.empty(3, 1, *size)).shape == (3, 7)


@pytest.mark.parametrize("name", SMALL)
def test_features_head_and_stages_agree_with_forward(name: str) -> None:
    model = create_model(name, 5).eval()
    assert isinstance(model, ConvNet)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad(), FeatureTaps(model, model.stages) as taps:
        logits = model(x)
        features = model.forward_features(x)
        torch.testing.assert_close(taps[model.stages[-1]], features)
        sizes = [kept.shape[-1] for _, kept in taps.items()]
    assert features.shape[:2] == (2, model.num_features)
    assert sizes == sorted(sizes, reverse=True)
    torch.testing.assert_close(model.forward_head(features), logits)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), logits)


@pytest.mark.parametrize("name", [*SMALL, "vgg8"])
def test_every_parameter_learns_and_activations_keep_their_scale(name: str) -> None:
    model = create_model(name, 10)
    logits = model(torch.randn(8, 3, 16, 16))
    assert 1e-3 < logits.std() < 10
    F.cross_entropy(logits, torch.arange(8)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # A bias before batch norm cancels; VGG has those because the published networks do.
        if not (name == "vgg8" and key.endswith("0.bias")):
            assert parameter.grad.abs().max() > 0, key


def test_wrn_shortcut_takes_the_activated_input_where_the_width_changes() -> None:
    block = create_model("wrn_16_2", 10).eval().block1.layer[0]
    x = torch.randn(1, 16, 4, 4)
    nn.init.zeros_(block.conv2.weight)
    torch.testing.assert_close(block(x), block.convShortcut(F.relu(block.bn1(x))))
    identity = create_model("wrn_16_1", 10).eval().block1.layer[0]
    nn.init.zeros_(identity.conv2.weight)
    torch.testing.assert_close(identity(x), x)


class Formula:
    """The layers of a block as functions of its own parameters, to write the block's formula with."""

    def __init__(self, block: nn.Module) -> None:
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):  # otherwise every batch norm is close to the identity
                for tensor in (module.weight.data, module.bias.data, module.running_mean):
                    tensor.uniform_(0.5, 1.5)
        self.state = block.eval().state_dict()

    def conv(self, name: str, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)

    def bn(self, name: str, x: torch.Tensor) -> torch.Tensor:
        parts = (self.state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)


def test_basic_blocks_follow_their_formula() -> None:
    x = torch.randn(2, 16, 6, 6)
    block = create_model("resnet8", 10).layer2[0]
    f = Formula(block)
    out = f.bn("bn2", f.conv("conv2", f.bn("bn1", f.conv("conv1", x, 2)).relu()))
    shortcut = f.bn("downsample.1", f.conv("downsample.0", x, 2))
    torch.testing.assert_close(block(x), (out + shortcut).relu())
    plain = create_model("resnet8", 10).layer1[0]
    f = Formula(plain)
    out = f.bn("bn2", f.conv("conv2", f.bn("bn1", f.conv("conv1", x)).relu()))
    torch.testing.assert_close(plain(x), (out + x).relu())


def test_bottleneck_follows_its_formula() -> None:
    x = torch.randn(2, 16, 5, 5)
    block = Bottleneck(16, 4, 2)
    f = Formula(block)
    out = f.bn("bn1", f.conv("conv1", x)).relu()
    out = f.bn("bn3", f.conv("conv3", f.bn("bn2", f.conv("conv2", out, 2)).relu()))
    shortcut = f.bn("shortcut.1", f.conv("shortcut.0", x, 2))
    torch.testing.assert_close(block(x), (out + shortcut).relu())


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (4, 2), (8, 1)])
def test_inverted_residual_follows_its_formula(channels: int, stride: int) -> None:
    x = torch.randn(2, 4, 5, 5)
    block = InvertedResidual(4, channels, stride, 3)
    f = Formula(block)
    out = f.bn("conv.1", f.conv("conv.0", x)).relu()
    out = f.bn("conv.4", f.conv("conv.3", out, stride, groups=12)).relu()
    out = f.bn("conv.7", f.conv("conv.6", out))
    torch.testing.assert_close(block(x), out + x if (channels, stride) == (4, 1) else out)


@pytest.mark.parametrize("stride", [1, 2])
def test_shuffle_unit_v1_follows_its_formula(stride: int) -> None:
    x = torch.randn(2, 12, 5, 5)
    block = ShuffleUnitV1(12, 24 if stride == 2 else 12, stride, 3)
    middle = block.conv2.out_channels
    f = Formula(block)
    out = f.bn("bn1", f.conv("conv1", x, groups=3)).relu()
    out = out[:, torch.arange(middle).reshape(3, -1).T.flatten()]
    out = f.bn("bn2", f.conv("conv2", out, stride, groups=middle)).relu()
    out = f.bn("bn3", f.conv("conv3", out, groups=3))
    pooled = F.avg_pool2d(x, 3, 2, 1)
    joined = torch.cat((out, pooled), 1) if stride == 2 else out + x
    torch.testing.assert_close(block(x), joined.relu())


def test_shuffle_units_v2_follow_their_formulas() -> None:
    x = torch.randn(2, 8, 5, 5)
    order = torch.arange(8).reshape(2, -1).T.flatten()
    unit = ShuffleUnitV2(8)
    f = Formula(unit)
    out = f.bn("bn2", f.conv("conv2", f.bn("bn1", f.conv("conv1", x[:, 4:])).relu(), groups=4))
    out = f.bn("bn3", f.conv("conv3", out)).relu()
    torch.testing.assert_close(unit(x), torch.cat((x[:, :4], out), 1)[:, order])
    down = ShuffleDownV2(8, 8)
    f = Formula(down)
    left = f.bn("bn2", f.conv("conv2", f.bn("bn1", f.conv("conv1", x, 2, groups=8)))).relu()
    right = f.bn("bn4", f.conv("conv4", f.bn("bn3", f.conv("conv3", x)).relu(), 2, groups=4))
    right = f.bn("bn5", f.conv("conv5", right)).relu()
    torch.testing.assert_close(down(x), torch.cat((left, right), 1)[:, order])


def test_channel_shuffle_interleaves_the_groups() -> None:
    x = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert ChannelShuffle(3)(x).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert ChannelShuffle(2)(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(("output_stride", "side"), [(32, 2), (16, 4), (8, 8), (None, 2)])
def test_output_stride_dilates_instead_of_striding(output_stride: int | None, side: int) -> None:
    model = meta("resnet50", 10, stem="imagenet", output_stride=output_stride)
    with torch.device("meta"):
        assert model.forward_features(torch.empty(1, 3, 64, 64)).shape == (1, 2048, side, side)
    assert count(model) == count(meta("resnet50", 10, stem="imagenet"))
    if output_stride == 8:
        assert [model.layer4[i].conv2.dilation[0] for i in range(3)] == [2, 4, 4]


def test_same_seed_same_weights() -> None:
    def build() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return create_model("mobilenet_v2", 4).state_dict()

    first, second = build(), build()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_state_dict_is_plain_tensors_and_round_trips_through_safetensors(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = create_model("shufflenet_v2", 4).eval(), create_model("shufflenet_v2", 4).eval()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(model(x), other(x))


def test_cifar_resnet_refuses_other_depths() -> None:
    from kdfast.models.resnet_cifar import CifarResNet

    with pytest.raises(ValueError, match="6n \\+ 2"):
        CifarResNet(10, depth=18)


def test_replaced_classifier_is_reported() -> None:
    model = create_model("resnet8", 10)
    model.fc = nn.Identity()
    with pytest.raises(TypeError, match="fc was replaced by a Identity"):
        model.get_classifier()


@pytest.mark.slow
def test_resnet8_learns_the_digits() -> None:
    train, test = (load_dataset("digits", split, image_size=16) for split in ("train", "test"))
    x, y = train.images / 255.0, train.labels
    model = create_model("resnet8", 10)
    steps = 12 * (len(x) // 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for step in range(steps):
        if step % (len(x) // 64) == 0:
            order = torch.randperm(len(x))
        batch = order[(step * 64) % (len(x) // 64 * 64) :][:64]
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test.images / 255.0).argmax(1) == test.labels).float().mean()
    # Chance is 0.1; after five epochs of `kdfast teach` this network had 98.1 … 99.4 %, 9 seeds and 4 roundings.
    assert accuracy >= 0.9
