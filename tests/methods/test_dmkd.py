"""DM-KD: the loss of each kind of label, and one whole step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.errors import ConfigError
from kdfast.methods import DMKD, DMKDConfig


@pytest.fixture
def outputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.tensor([0, 1, 2, 3, 4, 0])


def soft(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    log_q, p = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def test_soft_labels_are_the_papers_loss(outputs: tuple[torch.Tensor, ...]) -> None:
    student, teacher, target = outputs
    loss = DMKD()(student, teacher, target=target)
    torch.testing.assert_close(loss, soft(student, teacher, 10.0))
    (ours,) = torch.autograd.grad(loss, student)
    (theirs,) = torch.autograd.grad(soft(student, teacher, 10.0), student)
    torch.testing.assert_close(ours, theirs)


def test_pixels_of_segmentation_logits_count_as_samples() -> None:
    student, teacher = (torch.randn(2, 5, 3, 4, dtype=torch.float64) for _ in range(2))
    rows = [logits.movedim(1, -1).reshape(-1, 5) for logits in (student, teacher)]
    torch.testing.assert_close(DMKD()(student, teacher), soft(*rows, 10.0))


@pytest.mark.parametrize("hard", ["stored", "teacher"])
def test_hard_labels_are_cross_entropy_and_both_is_the_sum(
    outputs: tuple[torch.Tensor, ...], hard: str
) -> None:
    student, teacher, target = outputs
    labels = target if hard == "stored" else teacher.argmax(1)
    expected = F.cross_entropy(student, labels)
    alone = DMKD(config=DMKDConfig(labels="hard", hard_labels=hard))(student, teacher, target=target)  # type: ignore[arg-type]
    both = DMKD(config=DMKDConfig(labels="both", hard_labels=hard))(student, teacher, target=target)  # type: ignore[arg-type]
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(both, expected + soft(student, teacher, 10.0))


def test_mixed_labels_count_by_their_share(outputs: tuple[torch.Tensor, ...]) -> None:
    student, _, target = outputs
    other, lam = target.flip(0), torch.linspace(0, 1, 6, dtype=torch.float64)
    loss = DMKD(config=DMKDConfig(labels="hard"))(student, None, target=target, mixed_target=other, lam=lam)
    onehot = lam[:, None] * F.one_hot(target, 5) + (1 - lam[:, None]) * F.one_hot(other, 5)
    torch.testing.assert_close(loss, F.cross_entropy(student, onehot))


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 4)
        self.seen: torch.Tensor | None = None
        self.graded = True

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen, self.graded = images, torch.is_grad_enabled()
        return self.head(images.flatten(1))


def frozen() -> Recorder:
    return Recorder().eval().requires_grad_(False)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
    return values, torch.arange(4)


def test_a_step_leaves_the_teacher_alone_and_shows_both_the_same_mixed_images() -> None:
    teacher, student = frozen(), Recorder()
    DMKD(student, teacher).step(batch()).backward()
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.graded
    assert student.head.weight.grad is not None
    assert teacher.seen is student.seen
    assert not torch.equal(student.seen, batch()[0])


def test_cutmix_labels_follow_the_pixels() -> None:
    student = Recorder()
    config = DMKDConfig(labels="hard")
    for seed in range(5):
        torch.manual_seed(seed)
        loss = DMKD(student=student, config=config).step(batch())
        # Each image's class is its grey value, so its pixels say what its labels must be.
        shares = torch.stack([(student.seen[:, 0] == c).float().mean((1, 2)) for c in range(4)], 1)
        torch.testing.assert_close(loss, F.cross_entropy(student.head(student.seen.flatten(1)), shares))


def test_a_step_follows_the_global_generator_and_cutmix_can_be_left_out() -> None:
    teacher, student = frozen(), Recorder()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(DMKD(student, teacher).step(batch())))
    assert losses[0] == losses[1] != losses[2]
    DMKD(student, teacher, config=DMKDConfig(cutmix_alpha=None)).step(batch()[0])
    assert torch.equal(student.seen, batch()[0])


def test_hard_labels_alone_spare_the_teachers_pass() -> None:
    teacher, student = frozen(), Recorder()
    DMKD(student, teacher, config=DMKDConfig(labels="hard")).step(batch())
    assert teacher.seen is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"labels": "smooth"}, "labels: got 'smooth', accepted: soft, hard, both"),
        ({"hard_labels": "x"}, "hard_labels: got 'x'"),
        ({"cutmix_alpha": -1.0}, "cutmix_alpha: got -1.0"),
    ],
)
def test_bad_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DMKDConfig(**values)  # type: ignore[arg-type]


def test_what_is_missing_is_named(outputs: tuple[torch.Tensor, ...]) -> None:
    student, teacher, target = outputs
    with pytest.raises(ValueError, match="teacher_out: got None"):
        DMKD()(student)
    with pytest.raises(ValueError, match="target: got None"):
        DMKD(config=DMKDConfig(labels="hard"))(student, teacher)
    with pytest.raises(ValueError, match="lam: got None"):
        DMKD(config=DMKDConfig(labels="hard"))(student, teacher, target=target, mixed_target=target)
    with pytest.raises(ValueError, match="student: got None"):
        DMKD(teacher=frozen()).step(batch())
    with pytest.raises(ValueError, match="teacher: got None"):
        DMKD(student=Recorder()).step(batch())
