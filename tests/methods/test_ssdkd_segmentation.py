"""SSD-KD where every pixel has a class: probabilities, classes and the histogram by pixel, priorities by image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.methods.ssdkd.contents import BINS, Contents
from kdfast.replay import modulation
from tests.support.ssdkd import CLASSES, MEAN, STD, method, run, trajectory


def seen(images: Tensor) -> Tensor:
    return (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_the_histogram_counts_pixels() -> None:
    made = method(pixels=True, capacity=10)
    kept = torch.cat([made.synthesize() for _ in range(3)])[-10:]  # first in, first out
    predicted = made.teacher(seen(kept)).argmax(1)
    assert torch.equal(made.contents.class_counts(), predicted.flatten().bincount(minlength=CLASSES))
    probability = made.teacher(seen(kept)).softmax(1).amax(1)
    wanted = torch.histc(probability, BINS, 0, 1).long()
    # A probability on a bin's edge may fall on either side of it.
    assert (made.contents.difficulty_counts() - wanted).abs().sum() <= 2
    assert int(made.contents.difficulty_counts().sum()) == 10 * 64


def test_a_priority_is_the_images_mean() -> None:
    made = method(pixels=True, padding=0, flip=False)
    images = made.synthesize()
    with torch.no_grad():
        student, teacher = made.student.eval()(seen(images)).double(), made.teacher(seen(images)).double()
    kl = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1).mean((1, 2))
    torch.testing.assert_close(made.buffer.state_dict()["delta"][:6].double(), kl, rtol=1e-4, atol=1e-6)
    labels = teacher.argmax(1).flatten(1).mode(1).values
    counts = F.one_hot(teacher.argmax(1).flatten(1), CLASSES).sum(1)
    stored = made.buffer.state_dict()["labels"][:6].long()
    assert torch.equal(
        counts.gather(1, stored[:, None]), counts.gather(1, labels[:, None])
    )  # a most frequent class


def test_phi_is_each_pixels_own() -> None:
    made = method(pixels=True, target="teacher")
    logits = torch.randn(6, CLASSES, 4, 4)
    made.inversion._counts.copy_(torch.tensor([100, 20, 0, 3]))
    loss, phi = made.inversion._task(logits)
    p, c = logits.softmax(1).max(1)
    want = modulation(p, c, torch.tensor([100, 20, 0, 3]), 123, 2.0)
    torch.testing.assert_close(phi, want.mean())
    torch.testing.assert_close(loss, (want * F.cross_entropy(logits, c, reduction="none")).mean())


def test_random_targets_are_one_class_an_image() -> None:
    made = method(pixels=True, diversity=False, difficulty=False)
    logits = torch.randn(6, CLASSES, 4, 4)
    made.inversion._targets.copy_(torch.arange(6) % CLASSES)
    target = (torch.arange(6) % CLASSES)[:, None, None].expand(6, 4, 4)
    torch.testing.assert_close(made.inversion._task(logits)[0], F.cross_entropy(logits, target))


def test_the_students_loss_is_the_mean_over_pixels() -> None:
    made = method(pixels=True, weight_in_loss=True)
    student, teacher = torch.randn(2, CLASSES, 3, 3), torch.randn(2, CLASSES, 3, 3)
    weight = torch.tensor([1.0, 3.0])
    rows = F.kl_div((student / 20).log_softmax(1), (teacher / 20).softmax(1), reduction="none").sum(1)
    want = 400 * (rows * weight[:, None, None]).mean()
    # T² = 400 times a small difference of float32 logarithms: 2e-5 apart at some seeds.
    torch.testing.assert_close(made(student, teacher, weight), want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "removed", [{"difficulty": False}, {"diversity": False}, {"sampling": "uniform"}, {"bn": 0.0}]
)
def test_its_pieces_count_here_too(removed: dict[str, object]) -> None:
    whole = trajectory(pixels=True)
    assert whole.isfinite().all()
    assert not torch.equal(whole, trajectory(pixels=True, **removed))


def test_a_restored_run_goes_on_exactly() -> None:
    made = method(pixels=True)
    run(made, 3)
    saved, student = made.state_dict(), {k: v.clone() for k, v in made.student.state_dict().items()}
    want = run(made, 2)
    other = method(pixels=True, seed=9)
    other.load_state_dict(saved)
    other.student.load_state_dict(student)
    assert torch.equal(run(other, 2), want)


def test_rows_are_replaced_in_both_tables() -> None:
    contents = Contents(3, 4, torch.device("cpu"))
    contents.insert(torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([0.999, 0.1]))
    contents.insert(torch.tensor([2]), torch.tensor([0]), torch.tensor([1.0]))
    assert contents.class_counts().tolist() == [1, 1, 0, 0]
    assert contents.difficulty_counts().tolist() == [0] * (BINS - 1) + [2]
