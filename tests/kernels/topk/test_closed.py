"""The closed form that CPU tensors take is the definition, whatever a cache holds: padding, repeats, extreme logits."""

from __future__ import annotations

import math

import pytest
import torch

from kdfast.functional import topk_kd_loss
from kdfast.ops.common import closed as ops_closed
from kdfast.reference import closed
from kdfast.reference import topk as reference
from kdfast.reference.native import extension
from kdfast.reference.topk import Kept, topk_rows
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")

ROWS, CLASSES, KEPT, TEMPERATURE = 8, 40, 5, 2.0
Cache = dict[str, torch.Tensor]


@pytest.fixture(params=["loop", "operators"], autouse=True)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the loop of C++, and by operators, which is what there is without it."""
    if request.param == "operators":
        monkeypatch.setattr(reference, "extension", lambda: None)
    elif extension() is None:
        pytest.skip("the extension was not built")


def cache(kind: str) -> tuple[torch.Tensor, Cache]:
    """(student, what was kept of a teacher); rows 0 to 2 are ``kind``, the others plain."""
    student, teacher = 3 * torch.randn(ROWS, CLASSES), 3 * torch.randn(ROWS, CLASSES)
    some = slice(0, 3)
    if kind == "nearly equal":
        teacher[some] = student[some] + 1e-3 * torch.randn(3, CLASSES)
    if kind == "far apart":
        student[some] *= 60
    if kind == "one class of the student's":
        student[some, 7] = 400.0
    indices = teacher.topk(KEPT, -1).indices
    if kind == "padded":
        indices[0, 1:], indices[1, -1], indices[2, 0] = -1, -1, -1
    if kind == "a class twice":
        indices[0, 3], indices[2, 1] = indices[0, 1], indices[2, 4]
    logits = teacher.gather(-1, indices.clamp(min=0))
    if kind == "absent logits":
        logits[0, 2], logits[2, 0] = -math.inf, -math.inf
    return student, {
        "index": indices,
        "logits": logits,
        "normalizer": torch.logsumexp(teacher / TEMPERATURE, -1),
    }


KINDS = (
    "plain",
    "padded",
    "absent logits",
    "a class twice",
    "nearly equal",
    "far apart",
    "one class of the student's",
)
TAILS = ("bucket", "no normaliser", "renormalize")


def loss_of(student: torch.Tensor, kept: Cache, tail: str) -> torch.Tensor:
    extra = {"log_normalizer": kept["normalizer"]} if tail == "bucket" else {}
    form = "renormalize" if tail == "renormalize" else "bucket"
    return topk_kd_loss(
        student, kept["index"], kept["logits"], temperature=TEMPERATURE, tail=form, reduction="none", **extra
    )


def by_definition(student: torch.Tensor, kept: Cache, tail: str) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = student.double().requires_grad_()
    whole = kept["normalizer"].double() if tail == "bucket" else None
    named = Kept(kept["index"], whole, tail != "renormalize")
    rows = topk_rows(leaf, kept["logits"].double(), named, TEMPERATURE)
    rows = rows * TEMPERATURE**2
    return rows.detach(), torch.autograd.grad(rows.sum(), leaf)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_it_is_the_definition(kind: str, tail: str) -> None:
    student, kept = cache(kind)
    leaf = student.clone().requires_grad_()
    rows = loss_of(leaf, kept, tail)
    (grad,) = torch.autograd.grad(rows.sum(), leaf)
    want_rows, want_grad = by_definition(student, kept, tail)
    torch.testing.assert_close(rows.double(), want_rows, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_chunks_are_seams_that_do_not_show(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, kept = cache("padded")
    whole = loss_of(student, kept, tail)
    monkeypatch.setattr(closed, "CHUNK", CLASSES * 3 // 4)  # three rows, three, two
    torch.testing.assert_close(loss_of(student, kept, tail), whole)


def test_more_dimensions_are_more_rows() -> None:
    student, kept = cache("padded")
    flat = loss_of(student, kept, "bucket")
    shaped = {
        name: x.reshape(2, 4, KEPT) if x.dim() == 2 else x.reshape(2, 4, *x.shape[2:])
        for name, x in kept.items()
    }
    torch.testing.assert_close(loss_of(student.reshape(2, 4, CLASSES), shaped, "bucket"), flat.reshape(2, 4))


def test_the_definition_is_computed_for_no_plain_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding alone is no reason to pay for care; a row whose student nearly agrees is."""
    counted: list[int] = []
    original = reference.topk_rows
    monkeypatch.setattr(reference, "topk_rows", lambda s, *args: counted.append(len(s)) or original(s, *args))
    for kind in ("plain", "padded", "absent logits"):
        loss_of(*cache(kind), "bucket")
    assert counted == []
    loss_of(*cache("a class twice"), "bucket")
    assert counted == [2]


def test_the_closed_form_is_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = ops_closed._Closed.forward
    monkeypatch.setattr(
        ops_closed._Closed, "forward", staticmethod(lambda *args: calls.append(1) or original(*args))
    )
    student, kept = cache("plain")
    loss_of(student, kept, "bucket")
    assert calls == [1]
    loss_of(student.double(), kept, "bucket")
    assert calls == [1]
