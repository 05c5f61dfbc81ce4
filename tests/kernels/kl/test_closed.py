"""The closed forms that CPU tensors take: the numbers of the plain forms, in float64, wherever care is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kdfast.functional import dkd_loss, jsd_loss, kd_kl_div
from kdfast.ops.common import closed as _closed
from kdfast.reference import closed
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TARGET = torch.tensor([3, 0, 19, 7, 7, 1, 2, 5])
LOSSES: dict[str, Loss] = {
    "kl": lambda s, t: kd_kl_div(s, t, 2.0, reduction="sum"),
    "jsd": lambda s, t: jsd_loss(s, t, beta=0.3, temperature=2.0, reduction="sum"),
    "jsd, edge": lambda s, t: jsd_loss(s, t, beta=0.05, temperature=2.0, reduction="sum"),
    "dkd": lambda s, t: dkd_loss(s, t, TARGET, alpha=1.5, beta=4.0, temperature=2.0, reduction="sum"),
    "tckd": lambda s, t: dkd_loss(s, t, TARGET, alpha=1.0, beta=0.0, temperature=2.0, reduction="sum"),
}


def gradients(loss: Loss, student: torch.Tensor, teacher: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (student, teacher)]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("apart", [3.0, 0.3, 1e-2, 1e-4])
def test_from_far_apart_to_nearly_equal(name: str, apart: float) -> None:
    """Against the differentiable form in float64; 1e-4 apart, plain float32 sums would have no digit left."""
    student = 3 * torch.randn(8, 20)
    teacher = student + apart * torch.randn(8, 20)
    for got, want in zip(
        gradients(LOSSES[name], student, teacher), gradients(LOSSES[name], student.double(), teacher.double())
    ):
        assert relative(got, want) < 2e-5, name


@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_need_care_do_not_touch_the_others(name: str) -> None:
    """Near-equal rows, an absent class and plain rows in one tensor: each row is as it is alone."""
    student = 3 * torch.randn(8, 20)
    teacher = 3 * torch.randn(8, 20)
    teacher[1] = student[1] + 1e-3 * torch.randn(20)
    teacher[2, 11], student[2, 11] = -torch.inf, -torch.inf
    teacher[4, 12] = -torch.inf
    for got, want in zip(
        gradients(LOSSES[name], student, teacher), gradients(LOSSES[name], student.double(), teacher.double())
    ):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_are_seams_that_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = 3 * torch.randn(8, 20), 3 * torch.randn(8, 20)
    teacher[6] = student[6] + 1e-3
    whole = gradients(LOSSES[name], student, teacher)
    monkeypatch.setattr(closed, "CHUNK", 3 * 20)  # three rows, three, two
    for got, want in zip(gradients(LOSSES[name], student, teacher), whole):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", LOSSES)
def test_the_closed_form_is_what_ran(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = _closed._Closed.forward
    monkeypatch.setattr(
        _closed._Closed, "forward", staticmethod(lambda *args: calls.append(1) or original(*args))
    )
    LOSSES[name](torch.randn(8, 20), torch.randn(8, 20))
    assert calls == [1]
    LOSSES[name](torch.randn(8, 20).double(), torch.randn(8, 20).double())
    assert calls == [1]


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_backward_finds_what_the_first_one_found(name: str) -> None:
    student, teacher = (torch.randn(8, 20).requires_grad_() for _ in "st")
    loss = LOSSES[name](student, teacher)
    first = torch.autograd.grad(3 * loss, (student, teacher), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3 * loss, (student, teacher), retain_graph=True)
    for one, two, copy in zip(first, second, kept):
        torch.testing.assert_close(two, one)
        assert torch.equal(one, copy)
        assert one.data_ptr() != two.data_ptr()


def test_half_precision_and_a_class_dimension_in_front() -> None:
    student, teacher = 3 * torch.randn(4, 20, 5), 3 * torch.randn(4, 20, 5)
    target = torch.randint(20, (4, 5))
    losses: list[Loss] = [
        lambda s, t: jsd_loss(s, t, temperature=2.0, dim=1, reduction="sum"),
        lambda s, t: dkd_loss(s, t, target, temperature=2.0, dim=1, reduction="sum"),
    ]
    for loss in losses:
        half = [x.bfloat16() for x in (student, teacher)]
        got, want = gradients(loss, *half), gradients(loss, half[0].double(), half[1].double())
        assert got[1].dtype == torch.bfloat16
        for one, two in zip(got, want):
            assert relative(one, two) < 4e-3
