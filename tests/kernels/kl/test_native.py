"""The loops in C++ of the KL divergence and the JSD: the operators' numbers at every length, stride and edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kdfast.functional import jsd_loss, kd_kl_div
from kdfast.reference import closed as shared
from kdfast.reference.closed import Closed
from kdfast.reference.kl import closed as kl
from kdfast.reference.kl import kd_kl_closed
from kdfast.reference.native import extension
from kdfast.reference.pair import closed as pair
from kdfast.reference.pair import jsd_closed
from tests.conftest import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel"),
    pytest.mark.skipif(extension() is None, reason="the extension was not built"),
]

#: Below, at and above whole vectors of 16, and rows that are more than a few of them.
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 100, 1000)

Form = Callable[..., Closed]


def jsd_form(beta: float) -> Form:
    def form(s: torch.Tensor, t: torch.Tensor, *rest: Any) -> Closed:
        return jsd_closed(s, t, beta, *rest)

    return form


FORMS = {
    "kl": kd_kl_closed,
    "jsd": jsd_form(0.5),
    "jsd, most of the teacher": jsd_form(0.9),
    "jsd, least": jsd_form(0.05),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def together(got: Closed, want: Closed) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Losses and both gradients, which are there."""
    for one, two in zip(got, want, strict=True):
        assert one is not None
        assert two is not None
        yield one, two


def logits_of(classes: int, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return 3 * torch.randn(rows, classes), 3 * torch.randn(rows, classes)


@each_form
@pytest.mark.parametrize("classes", LENGTHS)
@pytest.mark.parametrize("temperature", [0.07, 1.0, 4.0, 1e4])
def test_every_length_and_temperature(form: Form, classes: int, temperature: float) -> None:
    student, teacher = logits_of(classes)
    got = form(student, teacher, temperature, 1, True, True)
    want = form(student.double(), teacher.double(), temperature, 1, True, True)
    for one, two in together(got, want):
        # δ, of logits 10/T apart, is rounded before the row's mean is taken from it.
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=2e-7 * max(1.0, 10 / temperature))


@pytest.mark.parametrize(
    ("form", "module", "operators"),
    [(kd_kl_closed, kl, "_plain"), (FORMS["jsd"], pair, "_jsd")],
    ids=["kl", "jsd"],
)
def test_it_is_what_runs_and_without_it_the_operators_do(
    form: Form, module: Any, operators: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> torch.Tensor:
        raise AssertionError("the operators ran")

    student, teacher = logits_of(20)
    with_it = form(student, teacher, 2.0, 1, True, True)
    half = form(student.bfloat16(), teacher.bfloat16(), 2.0, 1, True, False)
    with monkeypatch.context() as patch:
        patch.setattr(module, operators, refuse)
        form(student, teacher, 2.0, 1, True, True)
        form(student.bfloat16(), teacher.bfloat16(), 2.0, 1, True, False)
    monkeypatch.setattr(shared, "extension", lambda: None)
    without = form(student, teacher, 2.0, 1, True, True)
    torch.testing.assert_close(with_it, without)
    torch.testing.assert_close(half[1], form(student.bfloat16(), teacher.bfloat16(), 2.0, 1, True, False)[1])
    monkeypatch.setattr(module, operators, refuse)
    with pytest.raises(AssertionError, match="the operators ran"):
        form(student, teacher, 2.0, 1, True, True)


def near(classes: int, apart: float, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    teacher = 3 * torch.randn(rows, classes)
    return teacher + apart * torch.randn(rows, classes), teacher


@each_form
@pytest.mark.parametrize("classes", [*LENGTHS, 7, 8, 9])
@pytest.mark.parametrize(
    ("apart", "temperature"), [(1e-6, 1.0), (1e-3, 0.5), (0.02, 1.0), (1.0, 100.0), (3.0, 1e4)]
)
def test_rows_that_nearly_agree(form: Form, classes: int, apart: float, temperature: float) -> None:
    """Every digit of them: they are in float64 there."""
    student, teacher = near(classes, apart)
    got = form(student, teacher, temperature, 1, True, True)
    want = form(student.double(), teacher.double(), temperature, 1, True, True)
    # What the definition itself leaves of a divergence that is the difference of numbers near 1.
    left = 1e-15 if form is not kd_kl_closed else 1e-20
    for one, two in together(got, want):
        largest = float(two.abs().max())
        torch.testing.assert_close(one.double(), two, rtol=2e-7, atol=max(left, 1e-7 * largest))


@each_form
def test_rows_that_nearly_agree_but_for_classes_that_hardly_are(form: Form) -> None:
    """Where a class has next to no probability its logits may be far apart in a row that nearly agrees."""
    student, teacher = near(40, 1e-3)
    for place, (own, other) in enumerate([(-30.0, -20.0), (-20.0, -30.0), (-600.0, -900.0), (-9e4, -60.0)]):
        student[:, place], teacher[:, place] = own, other
    got = form(student, teacher, 1.0, 1, True, True)
    want = form(student.double(), teacher.double(), 1.0, 1, True, True)
    assert float(want[0].max()) < shared.CAREFUL_BELOW
    for one, two in together(got, want):
        torch.testing.assert_close(one.double(), two, rtol=2e-7, atol=1e-14)


@pytest.mark.parametrize(
    ("form", "module", "careful"),
    [(kd_kl_closed, kl, "_careful"), (FORMS["jsd"], pair, "_careful_mixture")],
    ids=["kl", "jsd"],
)
def test_only_rows_without_a_number_leave_the_loop(
    form: Form, module: Any, careful: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators in float64 took five times eager PyTorch's time for rows that nearly agree."""
    asked: list[int] = []
    original = getattr(module, careful)
    monkeypatch.setattr(module, careful, lambda *args: (asked.append(1), original(*args))[1])
    student, teacher = near(20, 1e-3, rows=6)
    half = student.bfloat16(), teacher.bfloat16()
    form(student, teacher, 10.0, 1, True, True)
    form(*half, 10.0, 1, True, True)
    form(student.view(3, 20, 2), teacher.view(3, 20, 2), 10.0, 1, True, False)
    assert not asked
    whole = form(student, teacher, 10.0, 1, True, True)
    student[2, 3] = math.nan
    odd = form(student, teacher, 10.0, 1, True, True)
    assert asked
    others = [0, 1, 3, 4, 5]
    for one, two in together(odd, whole):
        assert bool(one[2].isnan().any())
        torch.testing.assert_close(one[others], two[others], rtol=2e-7, atol=1e-12)


@each_form
def test_rows_that_lie_apart_and_classes_that_do(form: Form) -> None:
    student, teacher = logits_of(20, 8)
    want = form(student, teacher, 2.0, 1, True, True)
    wide = torch.full((8, 50), math.nan)
    wide[:, 7:27] = student
    apart = wide[:, 7:27]
    turned = teacher.t().contiguous().t()
    torch.testing.assert_close(form(apart, turned, 2.0, 1, True, True), want, rtol=0, atol=0)
    expanded = student[:1].expand(8, 20)
    once = form(expanded, teacher, 2.0, 1, True, False)
    torch.testing.assert_close(once, form(expanded.clone(), teacher, 2.0, 1, True, False), rtol=0, atol=0)


@each_form
def test_more_threads_give_the_same_bits(form: Form) -> None:
    """Enough elements for several threads, and a number of rows that they do not divide."""
    student, teacher = logits_of(4099, 257)
    student[::3] = teacher[::3] + 1e-3 * student[::3]  # and rows that nearly agree
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = form(student, teacher, 2.0, 1, True, True)
        torch.set_num_threads(3)
        three = form(student, teacher, 2.0, 1, True, True)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(three, one, rtol=0, atol=0)


@each_form
@pytest.mark.parametrize("at", [0, 3, 18])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1])
def test_every_nan_stays_one(form: Form, at: int, bits: int) -> None:
    """Whatever its payload, and in the row that has it alone."""
    value = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for role in (0, 1):
        logits = logits_of(19)
        logits[role][2, at] = value
        loss, grad, _ = form(*logits, 2.0, 1, True, False)
        assert grad is not None
        assert loss.isnan().tolist() == [False, False, True, False, False]
        assert grad.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("loss", [kd_kl_div, jsd_loss])
def test_absent_classes_and_logits_far_apart(loss: Callable[..., torch.Tensor]) -> None:
    student, teacher = logits_of(19)
    teacher[0, 3], student[1, 4] = -math.inf, -math.inf
    teacher[2, 18], student[2, 18] = -math.inf, -math.inf
    student[3] *= 1e4
    student.requires_grad_()
    got = loss(student, teacher, temperature=2.0, reduction="none").double()
    wide = student.detach().double().requires_grad_()
    want = loss(wide, teacher.double(), temperature=2.0, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    finite = want.isfinite()
    grads = (torch.autograd.grad(x[finite].sum(), of)[0] for x, of in ((got, student), (want, wide)))
    first, second = (grad[finite].double() for grad in grads)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_no_rows_and_no_classes() -> None:
    for shape in ((0, 5), (3, 0)):
        for form in FORMS.values():
            loss, grad, _ = form(torch.empty(shape), torch.empty(shape), 1.0, 1, True, False)
            assert grad is not None
            assert (loss.shape, grad.shape) == ((shape[0],), shape)
    for name, numbers in (("kl_rows", ()), ("jsd_rows", (0.5,))):
        with pytest.raises(ValueError, match="classes: got 0"):
            getattr(extension(), name)(3, 0, 0, 0, 0, 0, 1.0, 0, 0, 0, 1, 1e-3, *numbers)
