"""Detection: necks and shared heads by level, distances of scores and boxes, masks, and students with losses of their
own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.errors import ConfigError
from kdfast.methods import AT, KD, ATConfig, DiffKD, DiffKDConfig, FitNet, FitNetConfig
from kdfast.methods.diffkd import Pair
from kdfast.methods.diffkd.distance import distance
from kdfast.training import StepModule
from kdfast.training.supervised import boxes_mask, foreground_of, own_loss
from tests.support.detection import Detector, batch, networks

PLAIN = DiffKDConfig(latent_channels=None)
FPN = Pair("neck:*", name="fpn")
SCORES = Pair("head.scores", kind="logits", distance="sigmoid", name="scores")
BOXES = Pair("head.boxes", kind="logits", distance="l1", name="boxes")


def make(*pairs: Pair, config: DiffKDConfig = PLAIN, **options: Any) -> DiffKD:
    student, teacher = networks(**options)
    torch.manual_seed(3)
    return DiffKD(student, teacher, pairs=pairs, config=config, images=batch()[0])


# --- levels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dict", "tuple"])
@pytest.mark.parametrize("pair", [FPN, SCORES, BOXES])
def test_every_level_of_a_neck_and_of_a_shared_head_is_distilled(pair: Pair, form: str) -> None:
    method = make(pair, form=form)
    assert method.names == tuple(f"{pair.name}_{at}" for at in range(3))
    seen: list[Any] = []
    for conv in method.student.neck.convs:
        conv.register_forward_hook(
            lambda m, i, out: seen.append(out.retain_grad() or out) if m.training else None
        )
    method.config = DiffKDConfig(latent_channels=None, task_weight=0.0, diffusion_weight=0.0)
    method.step(batch()).backward()
    assert len(seen) == 3
    assert all(float(out.grad.abs().sum()) > 0 for out in seen)
    assert {f"kd_{pair.name}_{at}" for at in range(3)} <= set(method.parts)


def test_levels_by_name_are_those_of_the_whole_neck() -> None:
    whole = make(FPN)
    single = make(*(Pair(f"neck:{at}", name=f"fpn_{at}") for at in range(3)))
    single.load_state_dict(whole.state_dict())
    losses = []
    for method in (whole, single):
        torch.manual_seed(5)
        losses.append(method.step(batch()))
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_a_denoiser_a_level_or_one_for_all() -> None:
    own, shared = make(SCORES), make(Pair(**{**vars(SCORES), "denoiser": "head"}))
    assert list(own.denoising) == ["scores_0", "scores_1", "scores_2"]
    assert list(shared.denoising) == ["head"]
    assert 3 * sum(p.numel() for p in shared.denoising.parameters()) == sum(
        p.numel() for p in own.denoising.parameters()
    )
    shared.step(batch()).backward()
    assert set(shared.names) == set(own.names)
    # Pairs with one name share as well; what does not fit is refused.
    both = make(Pair("neck:0", name="a", denoiser="x.y"), Pair("neck:1", name="b", denoiser="x.y"))
    assert list(both.denoising) == ["x_y"]
    with pytest.raises(ValueError, match=r"'b' differs from others that share denoiser 'x'"):
        make(Pair("neck:0", name="a", denoiser="x"), Pair("head.scores#0", name="b", denoiser="x"))
    with pytest.raises(ValueError, match=r"'b' differs from others that share denoiser 'x'"):
        make(Pair("neck:0", name="a", denoiser="x"), Pair("neck:1", name="b", denoiser="x", distance="l1"))


def test_what_is_not_level_by_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 'neck' gave 3 maps; name one, 'neck:0' to 'neck:pool'"):
        make(Pair("neck"))
    with pytest.raises(ValueError, match=r"'neck:0' has 1 levels in a pass, the teacher's 'neck:\*' 3"):
        make(Pair("neck:0", "neck:*"))
    method = make(SCORES)
    method.student.train()(*batch())
    method.student.head.scores(torch.zeros(2, 4, 2, 2))
    with torch.no_grad():
        method.teacher(batch()[0])
    with pytest.raises(ValueError, match=r"'head.scores' has 4 levels in this pass, and had 3 when"):
        method.loss()


# --- distances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distances_of_scores_and_boxes(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 5, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    teacher = teacher.detach()
    config = DiffKDConfig(temperature=temperature)
    own, other = student / temperature, (teacher / temperature).sigmoid()
    # A cross-entropy that each class has by itself, less what the teacher alone makes it.
    bernoulli = F.binary_cross_entropy_with_logits(own, other, reduction="none")
    entropy = F.binary_cross_entropy(other, other, reduction="none")
    expected = (bernoulli - entropy).sum(1).mean() * temperature**2
    found = distance("sigmoid", student, teacher, config)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, student, retain_graph=True)[0] for value in (found, expected))
    )
    torch.testing.assert_close(distance("l1", student, teacher, config), F.l1_loss(student, teacher))
    for kind in ("sigmoid", "l1"):
        assert float(distance(kind, teacher, teacher, config)) == 0.0


def test_scores_that_are_sure_stay_finite() -> None:
    student = torch.tensor([-200.0, 200.0]).view(1, 2, 1, 1).requires_grad_()
    loss = distance("sigmoid", student, -student.detach(), DiffKDConfig())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(400.0)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", ["mse", "attention_mse", "l1", "kl", "sigmoid"])
def test_a_mask_makes_it_the_distance_of_what_it_shows(kind: Any) -> None:
    torch.manual_seed(1)
    student, teacher = (
        torch.randn(2, 3, 2, 4, dtype=torch.float64),
        torch.randn(2, 3, 2, 4, dtype=torch.float64),
    )
    config = DiffKDConfig()
    ones, half = torch.ones(2, 1, 2, 4), torch.zeros(2, 1, 2, 4)
    half[..., :2] = 1
    torch.testing.assert_close(
        distance(kind, student, teacher, config, ones), distance(kind, student, teacher, config)
    )
    masked = distance(kind, student, teacher, config, half)
    other = torch.where(half.bool(), student, 9.0)
    torch.testing.assert_close(distance(kind, other, teacher, config, half), masked)
    if kind != "attention_mse":  # whose attention is the whole map's
        cut = distance(kind, student[..., :2], teacher[..., :2], config)
        torch.testing.assert_close(masked, cut)
    assert float(distance(kind, student, teacher, config, half * 0)) == 0.0


def test_dist_has_no_mask() -> None:
    x = torch.randn(2, 3, 2, 2)
    with pytest.raises(ValueError, match=r"got a mask for distance='dist'.*accepted: mse"):
        distance("dist", x, x, DiffKDConfig(), torch.ones(2, 1, 2, 2))


def test_a_feature_has_no_distance_of_classes() -> None:
    for kind in ("kl", "dist", "sigmoid"):
        with pytest.raises(ConfigError, match=r"accepted for a feature: mse, attention_mse, l1 "):
            Pair("neck:0", distance=kind)  # type: ignore[arg-type]


# --- foreground ----------------------------------------------------------------------------------------------------


def test_the_mask_of_boxes() -> None:
    boxes = [torch.tensor([[1.2, 0.0, 3.0, 2.0], [4.0, 4.0, 4.0, 4.0]]), torch.zeros(0, 4)]
    mask = boxes_mask(boxes, (5, 6))
    assert mask.shape == (2, 5, 6)
    assert mask[0].nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2], [4, 4]]
    assert not mask[1].any()


def test_boxes_of_huggingface_are_shares_of_the_picture() -> None:
    labels = [
        {"boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]]), "size": torch.tensor([4, 8])},  # padded to 8×8
        {"boxes": torch.tensor([[0.25, 0.75, 0.5, 0.5]])},
    ]
    mask = foreground_of({"pixel_values": torch.zeros(2, 3, 8, 8), "labels": labels}, [])
    assert mask[0].nonzero().tolist() == [[row, column] for row in (1, 2) for column in (2, 3, 4, 5)]
    assert mask[1].nonzero().tolist() == [[row, column] for row in (4, 5, 6, 7) for column in (0, 1, 2, 3)]


def test_step_masks_by_the_targets_boxes() -> None:
    method = make(Pair("neck:0", name="a", background_weight=0.25))
    torch.manual_seed(2)
    stepped = method.step(batch())
    images, targets = batch()
    torch.manual_seed(2)
    with torch.no_grad():
        method.teacher(images)
    losses = method.student(images, targets)
    # The batch is padded to 16×24, and boxes are where the networks saw them.
    mask = boxes_mask([target["boxes"] for target in targets], (16, 24))
    by_hand = method.loss(foreground=mask) + sum(losses.values())
    torch.testing.assert_close(stepped, by_hand)
    level = method._levels[0]
    teacher = torch.zeros(2, 6, 8, 12)
    weights = level.places(mask, teacher)
    assert weights.shape == (2, 1, 8, 12)
    assert float(weights[1].max()) == 0.25
    assert float(weights[0].max()) == 1.0
    assert float(weights[0, 0, 0, 0]) == 0.25


def test_masks_are_refused_where_they_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"background_weight: got 1.5, accepted: from 0 to 1"):
        Pair("neck:0", background_weight=1.5)
    method = make(Pair("neck:0", name="a", background_weight=0.0))

    def passes() -> None:
        with torch.no_grad():
            method.teacher(batch()[0])
        method.student(*batch())

    passes()
    with pytest.raises(ValueError, match=r"foreground: got None; pair 'a' has a background_weight"):
        method.loss()
    passes()
    with pytest.raises(ValueError, match=r"foreground: got shape \(3, 4, 4\), accepted: \[B, H, W\] of 2"):
        method.loss(foreground=torch.ones(3, 4, 4))
    images, targets = batch()
    blind = [{"labels": target["labels"]} for target in targets]
    with pytest.raises((ValueError, KeyError)):
        method.step((images, blind))
    plain = make(FPN)
    passes()
    with pytest.raises(ValueError, match="got a mask, and no pair has a background_weight"):
        plain.loss(foreground=torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="the batch has no boxes"):
        foreground_of({"pixel_values": torch.zeros(1, 3, 4, 4)}, [])


# --- step ------------------------------------------------------------------------------------------------------------


def test_step_sums_the_students_own_losses() -> None:
    method = make(FPN, SCORES, BOXES)
    loss = method.step(batch())
    losses = method.student(*batch())
    torch.testing.assert_close(method.parts["task"], sum(losses.values()).detach())
    rest = sum(
        value for name, value in method.parts.items() if name.startswith(("kd_", "diffusion_", "task"))
    )
    torch.testing.assert_close(loss.detach(), rest)
    loss.backward()
    assert all(p.grad is not None for p in method.student.parameters())
    assert StepModule(method)(*batch()).requires_grad


def test_step_refuses_what_would_be_compared_in_two_sizes_and_students_without_a_loss() -> None:
    student, _ = networks()
    other = Detector(6, min_size=(32,)).eval().requires_grad_(False)
    method = DiffKD(student, other, pairs=[FPN], config=PLAIN, images=batch()[0])
    with pytest.raises(ValueError, match=r"student: its transform resizes by .*give both the same min_size"):
        method.step(batch())
    method = make(FPN, min_size=(16, 24))
    with pytest.raises(ValueError, match=r"draws one min_size of \(16, 24\)"):
        method.step(batch())
    method = make(FPN)
    method.student.eval()
    with pytest.raises(TypeError, match=r"student: returned a list without a loss; torchvision's detectors"):
        method.step(batch())
    with pytest.raises(ValueError, match="mixup_alpha, cutmix_alpha: the student computes its loss itself"):
        make(FPN, config=DiffKDConfig(latent_channels=None, mixup_alpha=0.2)).step(batch())


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, 3.0),
        ({"loss": torch.tensor(4.0), "x": torch.ones(2)}, 4.0),
    ],
)
def test_losses_of_libraries(output: Any, expected: float) -> None:
    assert float(own_loss(output)) == expected


@pytest.mark.parametrize("output", [{}, {"logits": torch.ones(2)}, {"loss": None}, [1], torch.ones(2)])
def test_no_loss_is_said(output: Any) -> None:
    with pytest.raises(TypeError, match="without a loss"):
        own_loss(output)


def test_baselines_of_features_take_detectors_and_those_of_logits_say_that_they_do_not() -> None:
    student, teacher = networks()
    layers = {"student_layers": ("neck:*", "head.scores"), "teacher_layers": ("neck:*", "head.scores")}
    method = FitNet(student, teacher, config=FitNetConfig(**layers), images=batch()[0])
    assert len(method.regressors) == 6
    method.step(batch()).backward()
    AT(student, teacher, config=ATConfig(**layers)).step(batch()).backward()
    with pytest.raises(
        ValueError, match=r"student_layers: have 3 levels, teacher_layers 1; as many are needed"
    ):
        FitNet(
            student,
            teacher,
            config=FitNetConfig(student_layers=("neck:*",), teacher_layers=("neck:0",)),
            images=batch()[0],
        )
    with pytest.raises(TypeError, match=r"output: got list; a tensor is needed|output: got dict"):
        KD(student, teacher).step(batch())


def test_huggingface_detr_by_its_own_batch() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")  # matches queries to boxes

    def detr(width: int) -> nn.Module:
        backbone = transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[width] * 4,
            depths=[1] * 4,
            layer_type="basic",
            out_features=["stage4"],
        )
        return transformers.DetrForObjectDetection(
            transformers.DetrConfig(
                use_timm_backbone=False,
                use_pretrained_backbone=False,
                backbone=None,
                backbone_config=backbone,
                d_model=width,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=8,
                decoder_ffn_dim=8,
                num_queries=5,
                num_labels=3,
            )
        )

    torch.manual_seed(0)
    student, teacher = detr(8), detr(16).eval().requires_grad_(False)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    labels = [{"class_labels": torch.tensor([1]), "boxes": boxes} for _ in range(2)]
    images = {"pixel_values": torch.rand(2, 3, 64, 96)}
    pairs = [
        Pair("model.input_projection", name="projection", background_weight=0.2),
        Pair("model.encoder", name="encoder"),
    ]
    method = DiffKD(student, teacher, pairs=pairs, config=PLAIN, images=images)
    loss = method.step({**images, "labels": labels})
    loss.backward()
    assert {"task", "kd_projection", "kd_encoder"} <= set(method.parts)
    assert float(student.model.input_projection.weight.grad.abs().sum()) > 0
    with pytest.raises(ValueError, match="the batch has no boxes"):
        method.step(images)
