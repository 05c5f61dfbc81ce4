"""DIST's closed form, which CPU tensors take: the definition's numbers and gradients, to both sides."""

from __future__ import annotations

import pytest
import torch

from kdfast.functional import dist_loss
from kdfast.ops.common import closed as ops_closed
from kdfast.reference.dist import dist
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")

OPTIONS = {"beta": 0.7, "gamma": 1.6, "temperature": 2.0}


def by_definition(student: torch.Tensor, teacher: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in (student, teacher)]
    value = dist(*leaves, *OPTIONS.values())
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def pair(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = 3 * torch.randn(8, 20), 3 * torch.randn(8, 20)
    if kind == "more dimensions":
        return student.view(2, 4, 20), teacher.view(2, 4, 20)
    if kind == "a uniform row":  # of 16 classes, whose share is a number: the centred row is exactly 0
        student, teacher = student[:, :16].clone(), teacher[:, :16].clone()
        student[2], teacher[5] = 1.5, -2.0
    if kind == "absent classes":
        student[1, 3], teacher[2, 4] = -torch.inf, -torch.inf
    if kind == "one row":
        return student[:1], teacher[:1]
    return student, teacher


@pytest.mark.parametrize("kind", ["plain", "more dimensions", "a uniform row", "absent classes", "one row"])
def test_it_is_the_definition(kind: str) -> None:
    student, teacher = pair(kind)
    leaves = [x.clone().requires_grad_() for x in (student, teacher)]
    value = dist_loss(*leaves, **OPTIONS)
    got = [value.detach(), *torch.autograd.grad(3 * value, leaves)]
    want = by_definition(student, teacher)
    for one, two, factor in zip(got, want, (1, 3, 3), strict=True):
        torch.testing.assert_close(one.double(), factor * two, rtol=1e-4, atol=1e-6)


def test_one_side_alone_and_half_precision() -> None:
    student, teacher = pair("plain")
    half = student.bfloat16()
    for own in (0, 1):
        logits = [half, teacher]
        logits[own] = logits[own].clone().requires_grad_()
        (grad,) = torch.autograd.grad(dist_loss(*logits, **OPTIONS), logits[own])
        assert grad.dtype == logits[own].dtype
        want = by_definition(half, teacher)[1 + own]
        assert float((grad.double() - want).norm() / want.norm()) < (4e-3 if own == 0 else 1e-5)


def test_the_closed_form_is_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = ops_closed._Closed.forward
    monkeypatch.setattr(
        ops_closed._Closed, "forward", staticmethod(lambda *args: calls.append(1) or original(*args))
    )
    student, teacher = pair("plain")
    dist_loss(student, teacher, **OPTIONS)
    assert calls == [1]
    dist_loss(student.double(), teacher.double(), **OPTIONS)
    assert calls == [1]
