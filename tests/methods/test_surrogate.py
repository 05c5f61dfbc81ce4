"""SurrogateKD: its targets, what it shows to both networks, and the recipe's way through it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.data import ShardWriter
from kdfast.errors import ConfigError, DataError
from kdfast.experiments.distill import run as distill
from kdfast.methods import SurrogateKD, SurrogateKDConfig
from kdfast.models import create_model
from kdfast.training import read_metrics
from kdfast.training.model_io import ModelConfig, save_model

PLAIN = SurrogateKDConfig(regime="none", mixup=False)


class Recorder(nn.Module):
    """A linear classifier that keeps what it was last shown outside an attack's gradient passes."""

    def __init__(self, classes: int = 4, scale: float = 8.0) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64, classes)
        with torch.no_grad():
            self.head.weight.mul_(scale)
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not images.requires_grad:
            self.seen.append(images)
        return self.head(images.flatten(1))


@pytest.fixture
def networks() -> tuple[Recorder, Recorder]:
    return Recorder().train(), Recorder()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(16, 3, 8, 8), torch.arange(16) % 4


def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    return student.requires_grad_(), teacher


def test_soft_targets_are_the_papers_loss() -> None:
    student, teacher = outputs()
    log_q, p = (student / 3).log_softmax(1), (teacher / 3).softmax(1)
    want = 9 * F.kl_div(log_q, p, reduction="batchmean")
    torch.testing.assert_close(SurrogateKD(config=SurrogateKDConfig(temperature=3))(student, teacher), want)


@pytest.mark.parametrize("targets, smoothing", [("one_hot", 0.0), ("label_smoothing", 0.25)])
def test_hard_targets_are_the_teachers_class(targets: Any, smoothing: float) -> None:
    student, teacher = outputs()
    target = F.one_hot(teacher.argmax(1), 5) * (1 - smoothing) + smoothing / 5
    want = -(target * student.log_softmax(1)).sum(1).mean()
    config = SurrogateKDConfig(targets=targets, smoothing=smoothing or 0.1)
    torch.testing.assert_close(SurrogateKD(config=config)(student, teacher), want)


def test_a_step_freezes_the_teacher_and_normalises_for_both(networks: Any, batch: Any) -> None:
    teacher, student = networks
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    SurrogateKD(teacher, student, PLAIN, mean=mean, std=std).step(batch).backward()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert student.head.weight.grad is not None
    want = (batch[0] - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(student.seen[-1], want)
    assert torch.equal(teacher.seen[-1], student.seen[-1])


@pytest.mark.parametrize("change", [{"regime": "standard"}, {"regime": "extreme"}, {"mixup": True}])
def test_both_see_the_same_changed_images(networks: Any, batch: Any, change: dict[str, Any]) -> None:
    teacher, student = networks
    SurrogateKD(teacher, student, replace(PLAIN, **change)).step(batch)
    assert torch.equal(teacher.seen[-1], student.seen[-1])
    assert student.seen[-1].shape == batch[0].shape
    assert not torch.equal(student.seen[-1], batch[0])
    assert 0 <= student.seen[-1].min() <= student.seen[-1].max() <= 1


def test_mixup_blends_pairs_of_augmented_images(networks: Any) -> None:
    teacher, student = networks
    flat = torch.linspace(0, 1, 16).view(16, 1, 1, 1).expand(16, 3, 8, 8).contiguous()
    SurrogateKD(teacher, student, replace(PLAIN, mixup=True)).step(flat)
    mixed = student.seen[-1]
    assert torch.allclose(mixed, mixed[:, :1, :1, :1].expand_as(mixed))
    assert mixed[:, 0, 0, 0].mean() == pytest.approx(0.5, abs=0.2)


def test_a_step_follows_the_global_generator(networks: Any, batch: Any) -> None:
    method = SurrogateKD(*networks, SurrogateKDConfig(attack=True, epsilon=0.1, alpha=0.02))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(method.step(batch).detach()))
    assert losses[0] == losses[1] != losses[2]


ATTACK = replace(PLAIN, attack=True, epsilon=0.03, alpha=0.008)


def test_the_batch_becomes_the_pairs(networks: Any, batch: Any) -> None:
    teacher, student = networks
    seen = {}
    for name, change in {
        "pairs": {"deeper": False},
        "deeper": {},
        "original": {"include_original": True},
    }.items():
        torch.manual_seed(0)
        _, parts = SurrogateKD(teacher, student, replace(ATTACK, **change)).step_with_parts(batch)
        seen[name] = student.seen[-1]
        assert torch.equal(teacher.seen[-1], seen[name])
    found = round(float(parts["attack_success"]) * 16)
    assert 4 < found < 16
    assert [len(images) for images in seen.values()] == [2 * found, 4 * found, 16 + 4 * found]
    assert torch.equal(seen["original"][:16], batch[0])
    assert torch.equal(seen["original"][16:], seen["deeper"])
    post, pre = seen["pairs"].chunk(2)
    before, after = (teacher(images).softmax(1) for images in (pre, post))
    assert (before.argmax(1) != after.argmax(1)).all()
    assert max(before.max(), after.max()) < ATTACK.threshold


def test_the_attack_starts_from_the_augmented_and_mixed_image(networks: Any, batch: Any) -> None:
    teacher, student = networks
    method = SurrogateKD(
        teacher, student, replace(ATTACK, regime="standard", mixup=True, include_original=True)
    )
    _, parts = method.step_with_parts(batch)
    shown = student.seen[-1]
    found = round(float(parts["attack_success"]) * 16)
    started, post = shown[:16], shown[16 : 16 + found]
    assert found
    nearest = torch.cdist(post.flatten(1), started.flatten(1), p=torch.inf).min(1).values
    assert nearest.max() <= ATTACK.epsilon + 1e-6
    assert torch.cdist(post.flatten(1), batch[0].flatten(1), p=torch.inf).min() > ATTACK.epsilon


def test_stored_targets_are_where_the_images_go(networks: Any, batch: Any) -> None:
    teacher, student = networks
    images, _ = batch
    labels = torch.full((16,), 2)
    method = SurrogateKD(teacher, student, replace(ATTACK, attack_targets="stored", deeper=False))
    method.step((images, labels))
    post = student.seen[-1].chunk(2)[0]
    assert (teacher(post).argmax(1) == 2).all()
    with pytest.raises(ValueError, match="batch: got images alone, accepted: images and labels"):
        method.step(images)


@pytest.mark.parametrize("change", [{"epsilon": 1e-6}, {"threshold": 0.2}])
def test_zero_successes_teach_the_batch_as_it_is(networks: Any, batch: Any, change: dict[str, Any]) -> None:
    teacher, student = networks
    loss, parts = SurrogateKD(teacher, student, replace(ATTACK, **change)).step_with_parts(batch)
    assert parts["attack_success"] == 0
    assert torch.equal(student.seen[-1], batch[0])
    loss.backward()


def test_a_teacher_of_one_class_is_taught_too(batch: Any) -> None:
    teacher, student = Recorder(), Recorder()
    with torch.no_grad():
        teacher.head.bias[1] = 100.0
    _, parts = SurrogateKD(teacher, student, ATTACK).step_with_parts(batch)
    assert parts["attack_success"] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"targets": "hard"}, "targets: got 'hard', accepted: soft, one_hot, label_smoothing"),
        ({"regime": "strong"}, "regime: got 'strong', accepted: none, standard, high, extreme"),
        ({"attack_targets": "x"}, "attack_targets: got 'x', accepted: random, stored"),
        ({"smoothing": 0.0}, "smoothing: got 0.0"),
        ({"smoothing": 1.0}, "smoothing: got 1.0"),
        ({"epsilon": 8.0}, "epsilon: got 8.0"),
        ({"alpha": 0.0}, "alpha: got 0.0"),
        ({"threshold": 1.5}, "threshold: got 1.5"),
        ({"attack_steps": 0}, "attack_steps: got 0"),
    ],
)
def test_bad_configs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SurrogateKDConfig(**values)


def test_what_is_missing_is_named(batch: Any) -> None:
    with pytest.raises(ValueError, match="student: got None"):
        SurrogateKD(Recorder()).step(batch)
    with pytest.raises(ValueError, match="teacher: got None"):
        SurrogateKD(student=Recorder()).step(batch)
    with pytest.raises(ValueError, match="mean, std: got one of them"):
        SurrogateKD(mean=(0.5, 0.5, 0.5))


# Through a recipe.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that has learned nothing, and shards of noise."""
    root = tmp_path_factory.mktemp("surrogate")
    torch.manual_seed(0)
    described = ModelConfig("resnet8", 10, 8, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2))
    save_model(root / "teacher", create_model("resnet8", 10), described)
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    for name, classes in (("shards", 10), ("others", 3)):
        with ShardWriter(root / name, num_classes=classes, image_format="png") as writer:
            writer.write(images, torch.arange(64) % classes)
    return root


def recipe(folder: Path, **values: Any) -> tuple[Any, Any]:
    common = {
        "method": "surrogate",
        "teacher": str(folder / "teacher"),
        "student": "resnet8",
        "data": str(folder / "shards"),
        "loader": "torch",
        "batch_size": 16,
        "epochs": 1,
        "device": "cpu",
        "log_every": 1,
        "tensorboard": False,
    }
    return distill.parse({**common, **values})


def test_a_recipe_trains_and_logs_the_attack(folder: Path, tmp_path: Path) -> None:
    config = recipe(folder, attack=True, epsilon=0.2, alpha=0.02, attack_steps=3, attack_targets="stored")
    metrics = distill.run(*config, tmp_path / "run", progress=False)
    assert (metrics["steps"], metrics["images"]) == (4, 64)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert all(0 <= line["attack_success"] <= 1 and 0 <= line["agreement"] <= 1 for line in lines)


def test_a_recipes_images_reach_the_step_in_zero_to_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = SurrogateKD.step_with_parts

    def spy(self: SurrogateKD, batch: Any, student: nn.Module | None = None) -> Any:
        seen.append(batch[0])
        return original(self, batch, student)

    monkeypatch.setattr(SurrogateKD, "step_with_parts", spy)
    distill.run(*recipe(folder, regime="none"), folder / "none", dry_run=True)
    assert len(seen) == 1
    assert seen[0].min() >= 0
    assert 0.9 < seen[0].max() <= 1


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"task": "segmentation"}, ConfigError, "task: got 'segmentation', accepted for method surrogate"),
        ({"augment": ["flip"]}, ConfigError, "augment: got flip beside regime=high, accepted: one of them"),
        (
            {"attack": True, "attack_targets": "stored", "data": "others"},
            DataError,
            "has 3 classes, accepted: the teacher's 10",
        ),
        ({"data": None}, ConfigError, "data: missing"),
    ],
)
def test_recipes_that_make_no_sense(
    folder: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    values = {key: str(folder / v) if v == "others" else v for key, v in values.items()}
    with pytest.raises(error, match=message):
        distill.run(*recipe(folder, **values), folder / "none", dry_run=True)
