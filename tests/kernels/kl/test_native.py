"""The KL divergence's loop in C++: the numbers of the operators it stands for, at every length, stride and edge."""

from __future__ import annotations

import math

import pytest
import torch

from kdfast.functional import kd_kl_div
from kdfast.reference.kl import closed, kd_kl_closed
from kdfast.reference.native import extension
from tests.conftest import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel"),
    pytest.mark.skipif(extension() is None, reason="the extension was not built"),
]

#: Below, at and above whole vectors of 16, and rows that are more than a few of them.
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 100, 1000)


def pair(classes: int, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return 3 * torch.randn(rows, classes), 3 * torch.randn(rows, classes)


@pytest.mark.parametrize("classes", LENGTHS)
@pytest.mark.parametrize("temperature", [0.07, 1.0, 4.0, 1e4])
def test_every_length_and_temperature(classes: int, temperature: float) -> None:
    student, teacher = pair(classes)
    got = kd_kl_closed(student, teacher, temperature, 1, True, True)
    want = kd_kl_closed(student.double(), teacher.double(), temperature, 1, True, True)
    for one, two in zip(got, want, strict=True):
        assert one is not None
        assert two is not None
        # δ, of logits 10/T apart, is rounded before the row's mean is taken from it.
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=2e-7 * max(1.0, 10 / temperature))


def test_it_is_what_runs_and_without_it_the_operators_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> torch.Tensor:
        raise AssertionError("the operators ran")

    student, teacher = pair(20)
    with_it = kd_kl_closed(student, teacher, 2.0, 1, True, True)
    half = kd_kl_closed(student.bfloat16(), teacher.bfloat16(), 2.0, 1, True, False)
    with monkeypatch.context() as patch:
        patch.setattr(closed, "_plain", refuse)
        kd_kl_closed(student, teacher, 2.0, 1, True, True)
        kd_kl_closed(student.bfloat16(), teacher.bfloat16(), 2.0, 1, True, False)
    monkeypatch.setattr(closed, "extension", lambda: None)
    without = kd_kl_closed(student, teacher, 2.0, 1, True, True)
    torch.testing.assert_close(with_it, without)
    torch.testing.assert_close(
        half[1], kd_kl_closed(student.bfloat16(), teacher.bfloat16(), 2.0, 1, True, False)[1]
    )


def test_rows_that_lie_apart_and_classes_that_do() -> None:
    student, teacher = pair(20, 8)
    want = kd_kl_closed(student, teacher, 2.0, 1, True, True)
    wide = torch.full((8, 50), math.nan)
    wide[:, 7:27] = student
    apart = wide[:, 7:27]
    turned = teacher.t().contiguous().t()
    torch.testing.assert_close(kd_kl_closed(apart, turned, 2.0, 1, True, True), want, rtol=0, atol=0)
    expanded = student[:1].expand(8, 20)
    once = kd_kl_closed(expanded, teacher, 2.0, 1, True, False)
    torch.testing.assert_close(
        once, kd_kl_closed(expanded.clone(), teacher, 2.0, 1, True, False), rtol=0, atol=0
    )


def test_more_threads_give_the_same_bits() -> None:
    """Enough elements for several threads, and a number of rows that they do not divide."""
    student, teacher = pair(4099, 257)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kd_kl_closed(student, teacher, 2.0, 1, True, True)
        torch.set_num_threads(3)
        three = kd_kl_closed(student, teacher, 2.0, 1, True, True)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(three, one, rtol=0, atol=0)


@pytest.mark.parametrize("at", [0, 3, 18])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1])
def test_every_nan_stays_one(at: int, bits: int) -> None:
    """Whatever its payload, and in the row that has it alone."""
    value = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for role in (0, 1):
        logits = pair(19)
        logits[role][2, at] = value
        loss, grad, _ = kd_kl_closed(*logits, 2.0, 1, True, False)
        assert grad is not None
        assert loss.isnan().tolist() == [False, False, True, False, False]
        assert grad.isnan().any(1).tolist() == [False, False, True, False, False]


def test_absent_classes_and_logits_far_apart() -> None:
    student, teacher = pair(19)
    teacher[0, 3], student[1, 4] = -math.inf, -math.inf
    teacher[2, 18], student[2, 18] = -math.inf, -math.inf
    student[3] *= 1e4
    got = kd_kl_div(student, teacher, 2.0, reduction="none").double()
    want = kd_kl_div(student.double(), teacher.double(), 2.0, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_no_rows_and_no_classes() -> None:
    for shape in ((0, 5), (3, 0)):
        loss, grad, _ = kd_kl_closed(torch.empty(shape), torch.empty(shape), 1.0, 1, True, False)
        assert grad is not None
        assert (loss.shape, grad.shape) == ((shape[0],), shape)
    with pytest.raises(ValueError, match="classes: got 0"):
        extension().kl_rows(3, 0, 0, 0, 0, 0, 1.0, 0, 0, 0, 1)
