"""DiffKD's flags, one by one: each changes the loss or a gradient. Layouts, sizes and kinds of features."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.functional import dist_loss, kd_kl_div
from kdfast.methods.diffkd import DiffKD, DiffKDConfig, Pair
from kdfast.methods.diffkd.distance import attention, distance
from kdfast.models import FeatureTaps, create_model
from kdfast.models.maps import as_map, fit, last_feature
from tests.support.diffkd import Net, batch, gradients, make, networks

#: Two values of each flag, and what else they need.
FLAGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "distill": ("both", "feature", {}),
    "student_layer": ("last", "stem", {}),
    "teacher_layer": ("last", "stem", {}),
    "latent_channels": (8, None, {}),
    "steps": (5, 2, {}),
    "adapter": (True, False, {}),
    "proj": (True, False, {}),
    "feature_distance": ("mse", "attention_mse", {}),
    "logits_distance": ("kl", "dist", {}),
    "temperature": (1.0, 3.0, {}),
    "dist_beta": (1.0, 2.0, {"logits_distance": "dist"}),
    "dist_gamma": (1.0, 2.0, {"logits_distance": "dist"}),
    "attention_temperature": (0.5, 0.1, {"feature_distance": "attention_mse"}),
    "task_weight": (1.0, 2.0, {}),
    "diffusion_weight": (1.0, 2.0, {}),
    "autoencoder_weight": (1.0, 2.0, {}),
    "feature_weight": (1.0, 2.0, {}),
    "logits_weight": (1.0, 2.0, {}),
    "label_smoothing": (0.0, 0.1, {}),
    "mixup_alpha": (None, 0.8, {}),
    "cutmix_alpha": (None, 1.0, {}),
    "train_steps": (1000, 100, {}),
    "beta_start": (1e-4, 1e-3, {}),
    "beta_end": (0.02, 0.01, {}),
}
# No other number, but another way to it; tested where that shows.
ELSEWHERE = {"resize", "checkpoint", "ignore_index", "student_logits", "teacher_logits"}


def outcome(**config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    method = make(**config)
    torch.manual_seed(5)
    loss, _ = method(*batch())
    loss.backward()
    return loss.detach(), gradients(method)


@pytest.mark.parametrize(
    "flag", [field.name for field in fields(DiffKDConfig) if field.name not in ELSEWHERE]
)
def test_a_flag_changes_the_loss(flag: str) -> None:
    default, other, needs = FLAGS[flag]
    first, _ = outcome(**{**needs, flag: default})
    again, _ = outcome(**{**needs, flag: default})
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    changed, _ = outcome(**{**needs, flag: other})
    assert abs(float(changed - first)) > 1e-6, flag


def test_where_logits_are_read_is_a_choice() -> None:
    """The same values by another name: the same loss; another layer: another."""
    assert float(outcome()[0]) == float(outcome(student_logits="fc", teacher_logits="fc")[0])

    class Doubled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    state = torch.random.get_rng_state()
    doubled = []
    for layer in (":output", "fc"):
        torch.random.set_rng_state(state)
        torch.manual_seed(7)
        student, teacher = Doubled(4), Doubled(6).eval().requires_grad_(False)
        method = make(
            student=student, teacher=teacher, distill="logits", teacher_logits=layer, student_logits=layer
        )
        torch.manual_seed(5)
        doubled.append(float(method(*batch())[1]["kd_logits"]))
    assert doubled[0] != doubled[1]


def test_ignored_pixels_do_not_count() -> None:
    class Dense(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.last(self.stem(x)).movedim(1, -1)).movedim(-1, 1)

    torch.manual_seed(0)
    student, teacher = Dense(4), Dense(6).eval().requires_grad_(False)
    images, _ = batch()
    masks = torch.randint(5, (4, 8, 8))
    masks[:, :4] = 3
    ignored = masks.clone()
    ignored[:, :4] = 255
    found = []
    for target, index in ((masks, 255), (ignored, 255), (masks, 3)):
        method = make(student=student, teacher=teacher, distill="logits", ignore_index=index)
        found.append(float(method(images, target)[1]["task"]))
        logits = F.interpolate(student(images), size=(8, 8), mode="bilinear", align_corners=False)
        expected = F.cross_entropy(logits, target, ignore_index=index)
        assert found[-1] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found[0] != found[1]
    assert found[1] == pytest.approx(
        float(F.cross_entropy(logits.detach(), ignored, ignore_index=255)), rel=1e-5
    )
    assert method.denoising["logits"].denoiser.embedding.weight.shape == (1280, 5)
    method = make(student=student, teacher=teacher, distill="logits", mixup_alpha=0.5)
    with pytest.raises(ValueError, match="dense targets are not mixed"):
        method(images, masks)


def test_pairs_of_any_kind_add_up() -> None:
    pairs = (Pair("stem", name="early"), Pair("last", weight=15.0), Pair("fc", kind="logits", distance="mse"))
    method = make(*pairs)
    assert method.names == ("early", "feature_last", "logits")
    loss, parts = method(*batch())
    kd = parts["kd_early"] + 15 * parts["kd_feature_last"] + parts["kd_logits"]
    rest = sum(v for k, v in parts.items() if k.startswith(("diffusion", "autoencoder", "task")))
    torch.testing.assert_close(loss.detach(), kd + rest)
    assert not any("." in key for key in method.denoising)


@pytest.mark.parametrize(
    ("kind", "size"), [("mse", 1), ("mse", 4), ("attention_mse", 4), ("kl", 1), ("kl", 3), ("dist", 3)]
)
def test_distances_are_plain_formulas(kind: Any, size: int) -> None:
    config = DiffKDConfig(temperature=2.0, dist_beta=1.5, dist_gamma=0.5)
    s, t = (torch.randn(6, 5, size, size, dtype=torch.float64) for _ in range(2))
    found = distance(kind, s, t, config)
    if kind == "mse":
        expected = F.mse_loss(s, t)
    elif kind == "attention_mse":
        spatial = size**2 * (t.abs().mean(1).flatten(1) / 0.5).softmax(1).view(6, 1, size, size)
        channel = 5 * (t.abs().mean((2, 3)) / 0.5).softmax(1)[:, :, None, None]
        expected = (spatial * channel * (s - t) ** 2).mean()
        torch.testing.assert_close(attention(t, 0.5), spatial * channel)
        assert float(attention(t, 0.5).mean((2, 3)).mean()) == pytest.approx(1, abs=1e-9)
    else:
        rows = [x.movedim(1, -1).reshape(-1, 5) for x in (s, t)]
        expected = (
            kd_kl_div(*rows, 2.0) if kind == "kl" else dist_loss(*rows, beta=1.5, gamma=0.5, temperature=2.0)
        )
    torch.testing.assert_close(found, expected)


def test_layouts_of_transformers_are_maps() -> None:
    x = torch.arange(2 * 3 * 3 * 5.0).view(2, 3, 3, 5)  # [B, H, W, C]
    expected = x.movedim(-1, 1)
    torch.testing.assert_close(as_map(x, "channels_last", "swin"), expected)
    torch.testing.assert_close(as_map(expected, "channels_first", "conv"), expected)
    torch.testing.assert_close(as_map(x, "channels_first", "conv"), x)
    tokens = x.flatten(1, 2)
    torch.testing.assert_close(as_map(tokens, "auto", "vit"), expected)
    with_class = torch.cat([tokens[:, :1], tokens], 1)
    torch.testing.assert_close(as_map(with_class, "auto", "vit"), expected)
    assert as_map(x[:, 0, 0], "auto", "fc").shape == (2, 5, 1, 1)
    for wrong in (tokens[:, :7], x[None], x.long()):
        with pytest.raises(ValueError, match="'vit' gave"):
            as_map(wrong, "auto", "vit")


class Tokens(Net):
    """A network whose last layer gives tokens, or maps with the channels last."""

    def __init__(self, width: int, layout: str) -> None:
        super().__init__(width)
        self.layout, self.norm = layout, nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.last(self.stem(x)).movedim(1, -1)
        out = self.norm(maps.flatten(1, 2) if self.layout == "tokens" else maps)
        return self.fc(out.flatten(1, -2).mean(1))


@pytest.mark.parametrize("layout", ["tokens", "swin"])
def test_a_transformer_teaches_a_convolutional_student(layout: str) -> None:
    torch.manual_seed(0)
    teacher = Tokens(6, layout).eval().requires_grad_(False)
    method = make(Pair("last", "norm"), Pair(":output", kind="logits"), teacher=teacher)
    assert method.denoising["feature"].autoencoder.encoder.in_channels == 6
    assert bool(method.step(batch()).isfinite())
    student = make(Pair("norm", "last"), student=Tokens(4, layout))
    assert student.denoising["feature"].trans.in_channels == 4
    assert bool(student.step(batch()).isfinite())
    forced = make(Pair("last", "last", teacher_layout="channels_last"))
    assert forced.denoising["feature"].autoencoder.encoder.in_channels == 4  # the map's width, as told


def test_sizes_that_differ_are_brought_together_or_refused() -> None:
    large = torch.arange(32.0).view(1, 2, 4, 4)
    torch.testing.assert_close(fit(large, (2, 2), "student", "a"), F.avg_pool2d(large, 2))
    small = F.interpolate(large, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(fit(large, (8, 8), "student", "a"), small)
    assert fit(large, (2, 7), "student", "a").shape == (1, 2, 2, 7)
    assert fit(large, (4, 4), "refuse", "a") is large
    with pytest.raises(ValueError, match="'a' are 4×4 and 2×2"):
        fit(large, (2, 2), "refuse", "'a'")

    class Coarse(Net):
        def __init__(self) -> None:
            super().__init__(4)
            self.last[0].stride = (2, 2)

    torch.manual_seed(0)
    for own, other in ((Coarse(), Net(6)), (Net(4), Coarse())):
        other.eval().requires_grad_(False)
        assert bool(make(student=own, teacher=other).step(batch()).isfinite())
        with pytest.raises(ValueError, match="sizes must match with resize='refuse'"):
            make(student=own, teacher=other, resize="refuse")


def test_the_last_feature_of_networks_is_known() -> None:
    assert last_feature(create_model("wrn_16_1", 5), "student_layer") == "relu"

    class Timm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.global_pool = nn.AdaptiveAvgPool2d(1)

    class Swin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), Timm()

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 5)

    assert last_feature(Timm(), "student_layer") == "global_pool:input"
    assert last_feature(Swin(), "student_layer") == "head:input"
    assert last_feature(Vit(), "student_layer") == "norm"
    with pytest.raises(ValueError, match=r"student_layer: got None, .* top ones are 0, 1"):
        last_feature(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "student_layer")
    student, teacher = networks()
    with pytest.raises(ValueError, match="pass a batch"):
        DiffKD(
            student, nn.Sequential(nn.Linear(7, 2)).eval().requires_grad_(False), pairs=[Pair("last", "0")]
        )
    assert DiffKD(student, teacher).denoising["feature"].config == DiffKDConfig()


def test_taps_read_what_a_network_returns() -> None:
    student, _ = networks()
    images, _ = batch()
    with FeatureTaps(student, [":output", "fc:input"]) as taps:
        logits = student(images)
        torch.testing.assert_close(taps[":output"], logits)
        torch.testing.assert_close(student.fc(taps["fc:input"]), logits)
    with pytest.raises(ValueError, match="no layer 'output'"):
        FeatureTaps(student, ["output"])
