"""The top-k loss's loop in C++: the definition's numbers at every width, stride and edge, on any number of threads."""

from __future__ import annotations

import math

import pytest
import torch

from kdfast.reference import topk as reference
from kdfast.reference.native import extension
from kdfast.reference.topk import Kept, topk_closed, topk_rows
from tests.conftest import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel"),
    pytest.mark.skipif(extension() is None, reason="the extension was not built"),
]

TEMPERATURE = 2.0
TAILS = ("bucket", "no normaliser", "renormalize")
Cache = tuple[torch.Tensor, torch.Tensor, Kept]


def cache(classes: int, tail: str = "bucket", rows: int = 5, kept: int = 4) -> Cache:
    student, teacher = 3 * torch.randn(rows, classes), 3 * torch.randn(rows, classes)
    found = teacher.topk(min(kept, classes), -1)
    whole = torch.logsumexp(teacher / TEMPERATURE, -1) if tail == "bucket" else None
    return student, found.values, Kept(found.indices, whole, tail != "renormalize")


def by_loop(student: torch.Tensor, logits: torch.Tensor, kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    loss, grad, none = topk_closed(student, logits, kept, TEMPERATURE, True)
    assert grad is not None
    assert none is None
    return loss, grad


def by_definition(
    student: torch.Tensor, logits: torch.Tensor, kept: Kept
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = student.double().requires_grad_()
    whole = None if kept.normalizer is None else kept.normalizer.double()
    rows = topk_rows(leaf, logits.double(), kept._replace(normalizer=whole), TEMPERATURE)
    return rows.detach(), TEMPERATURE * torch.autograd.grad(rows.sum(), leaf)[0]


def assert_same(one: Cache, limit: float = 2e-6) -> None:
    for got, want in zip(by_loop(*one), by_definition(*one), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=limit)


# Below, at and above whole vectors of 16; as many classes as are kept, and fewer.
@pytest.mark.parametrize("classes", [1, 2, 4, 5, 15, 16, 17, 31, 33, 100, 1000])
@pytest.mark.parametrize("tail", TAILS)
def test_every_width(classes: int, tail: str) -> None:
    assert_same(cache(classes, tail))


@pytest.mark.parametrize("tail", TAILS)
def test_it_is_what_runs(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> torch.Tensor:
        raise AssertionError("the operators ran")

    for name in ("_places", "topk_rows"):
        monkeypatch.setattr(reference, name, refuse)
    student, logits, kept = cache(40, tail)
    by_loop(student, logits, kept)
    by_loop(student.bfloat16(), logits.half(), kept)
    by_loop(student.view(5, 1, 40), logits.view(5, 1, 4), kept._replace(classes=kept.classes.view(5, 1, 4)))


def test_without_a_gradient_the_loss_is_the_same() -> None:
    student, logits, kept = cache(50)
    loss, *grads = topk_closed(student, logits, kept, TEMPERATURE, False)
    assert grads == [None, None]
    assert torch.equal(loss, by_loop(student, logits, kept)[0])


def test_tensors_that_lie_apart() -> None:
    student, logits, kept = cache(20, rows=8)
    want = by_loop(student, logits, kept)
    wide = torch.full((8, 50), math.nan)
    wide[:, 7:27] = student
    assert kept.normalizer is not None
    spread = Kept(
        kept.classes.t().contiguous().t(), torch.stack((kept.normalizer, kept.normalizer), 1)[:, 0], True
    )
    got = by_loop(wide[:, 7:27], logits.t().contiguous().t(), spread)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    turned = by_loop(student.t().contiguous().t(), logits, kept)
    torch.testing.assert_close(turned, want, rtol=0, atol=0)


@pytest.mark.parametrize("tail", TAILS)
def test_more_threads_give_the_same_bits(tail: str) -> None:
    one = cache(4099, tail, rows=257, kept=30)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(by_loop(*one))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("tail", TAILS)
def test_a_nan_is_in_its_row_alone(tail: str) -> None:
    student, logits, kept = cache(19, tail)
    student[2, kept.classes[2, 0]], logits[3, 1] = math.nan, math.nan
    loss, grad = by_loop(student, logits, kept)
    assert loss.isnan().tolist() == [False, False, True, True, False]
    assert grad.isnan().any(1).tolist() == [False, False, True, True, False]


def test_a_row_that_names_nothing_is_nothing_even_of_nan() -> None:
    student, logits, kept = cache(19)
    kept.classes[1], student[1] = -1, math.nan
    logits[2], student[2, 5] = -math.inf, math.inf
    loss, grad = by_loop(student, logits, kept)
    assert not loss[1:3].any()
    assert not grad[1:3].any()
    assert bool(loss.isfinite().all())


def test_absent_classes_and_logits_far_apart() -> None:
    student, logits, kept = cache(50, rows=6, kept=8)
    others = [c for c in range(50) if c not in kept.classes[0].tolist()]
    student[0, others[0]] = -math.inf  # outside: nothing but a class less
    student[1] *= 1e3
    student[2, kept.classes[2, 3]] = 90.0  # of the rest nothing is left
    student[3, others[1]] = 90.0
    assert kept.normalizer is not None
    kept.normalizer[4] -= 0.5  # kept probabilities of more than 1
    got, want = by_loop(student, logits, kept), by_definition(student, logits, kept)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-6)
    student[5, kept.classes[5, 0]] = -math.inf
    assert by_loop(student, logits, kept)[0][5] == by_definition(student, logits, kept)[0][5] == math.inf


def test_no_rows_and_no_classes() -> None:
    loss, grad = by_loop(torch.empty(0, 5), torch.empty(0, 2), Kept(torch.empty(0, 2).long(), None, True))
    assert (loss.shape, grad.shape) == ((0,), (0, 5))
    with pytest.raises(ValueError, match="classes: got 0"):
        extension().topk_rows([3, 0, 0, 1], 0, [0, 0, 0], True, 1.0, 0, 0, 1)
