"""DIST's loop in C++: the definition's numbers at every width, stride and edge, and the bits of one thread on any."""

from __future__ import annotations

import pytest
import torch

from kdfast.reference import dist as reference
from kdfast.reference.native import extension
from tests.conftest import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel"),
    pytest.mark.skipif(extension() is None, reason="the extension was not built"),
]

BETA, GAMMA = 0.7, 1.6
Results = tuple[torch.Tensor | None, ...]


def by_loop(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 2.0) -> Results:
    return reference.dist_closed(student, teacher, BETA, GAMMA, temperature, True, True)


def by_definition(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 2.0) -> Results:
    """Without the factor T², and T times the gradients."""
    leaves = [x.double().requires_grad_() for x in (student, teacher)]
    value = reference.dist(*leaves, BETA, GAMMA, temperature) / temperature**2
    return value.detach(), *(temperature * g for g in torch.autograd.grad(value, leaves))


def assert_same(got: Results, want: Results) -> None:
    """Gradients by their norm: where ρ is near 1 an element is what two greater ones leave of each other."""
    for one, two, limit in zip(got, want, (1e-6, 2e-5, 2e-5), strict=True):
        assert one is not None
        assert two is not None
        assert float((one.double() - two.double()).norm()) <= limit * float(two.norm())


# Below, at and above whole vectors of 16 and the pairs of them that are read together; rows likewise.
@pytest.mark.parametrize("classes", [9, 15, 16, 17, 31, 32, 33, 100, 1000])
@pytest.mark.parametrize("rows", [8, 15, 16, 17, 70])
def test_every_width_and_height(classes: int, rows: int) -> None:
    student, teacher = 3 * torch.randn(rows, classes), 3 * torch.randn(rows, classes)
    assert_same(by_loop(student, teacher), by_definition(student, teacher))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 2), (2, 40), (3, 2)])
def test_the_least_shapes(shape: tuple[int, int]) -> None:
    """Two values correlate by 1 or -1 whatever they are: gradients are nothing but rounding, but finite."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    value, *grads = by_loop(student, teacher)
    torch.testing.assert_close(value.double(), by_definition(student, teacher)[0], rtol=0, atol=2e-6)  # type: ignore[union-attr]
    for grad in grads:
        assert grad is not None
        assert grad.shape == shape
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
def test_every_temperature(temperature: float) -> None:
    student, teacher = 3 * torch.randn(20, 50), 3 * torch.randn(20, 50)
    assert_same(by_loop(student, teacher, temperature), by_definition(student, teacher, temperature))


def test_probabilities_that_differ_in_their_last_digits() -> None:
    student, teacher = 3 * torch.randn(20, 50), 3 * torch.randn(20, 50)
    for one, two in zip(by_loop(student, teacher, 1e4), by_definition(student, teacher, 1e4), strict=True):
        assert float((one - two).norm() / two.norm()) < 1e-3  # type: ignore[operator, union-attr]


def test_it_is_what_runs_and_without_it_the_operators_do(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = 3 * torch.randn(12, 40), 3 * torch.randn(12, 40)
    calls: list[int] = []
    native = extension()

    class Counting:
        @staticmethod
        def dist_loss(*arguments: object) -> float:
            calls.append(1)
            value: float = native.dist_loss(*arguments)
            return value

    monkeypatch.setattr(reference, "extension", lambda: Counting)
    got, half = by_loop(student, teacher), by_loop(student.bfloat16(), teacher)
    assert calls == [1, 1]
    by_loop(student.double(), teacher)
    assert calls == [1, 1]
    monkeypatch.setattr(reference, "extension", lambda: None)
    assert_same(got, by_loop(student, teacher))
    assert_same(half, by_loop(student.bfloat16(), teacher))


def test_one_side_or_no_gradient() -> None:
    student, teacher = torch.randn(9, 20), torch.randn(9, 20)
    both = by_loop(student, teacher)
    for need in ((True, False), (False, True), (False, False)):
        value, *grads = reference.dist_closed(student, teacher, BETA, GAMMA, 2.0, *need)
        assert torch.equal(value, both[0])  # type: ignore[arg-type]
        for wanted, grad, full in zip(need, grads, both[1:], strict=True):
            assert grad is None if not wanted else torch.equal(grad, full)  # type: ignore[arg-type]


def test_rows_that_lie_apart_and_classes_that_do() -> None:
    student, teacher = torch.randn(8, 20), torch.randn(8, 20)
    wide = torch.full((8, 50), torch.nan)
    wide[:, 7:27] = student
    got = by_loop(wide[:, 7:27], teacher.t().contiguous().t())
    torch.testing.assert_close(got, by_loop(student, teacher), rtol=0, atol=0)
    once = by_loop(student[:1].expand(8, 20), teacher)
    torch.testing.assert_close(once, by_loop(student[:1].repeat(8, 1), teacher), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(257, 4099), (3, 100_001), (40_000, 20)])
def test_more_threads_give_the_same_bits(shape: tuple[int, int]) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(by_loop(student, teacher))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 16, 40, 100])
@pytest.mark.parametrize("side", [0, 1])
def test_columns_that_are_the_same_everywhere_have_no_correlation(rows: int, side: int) -> None:
    """To the last bit, whatever number of equal probabilities is summed: ε would make much of what a mean rounds."""
    same, other = (3 * torch.randn(1, 24)).expand(rows, 24), 3 * torch.randn(rows, 24)
    pair = (same, other) if side == 0 else (other, same)
    value, *grads = reference.dist_closed(*pair, 0.0, GAMMA, 2.0, True, True)
    assert value.item() == pytest.approx(GAMMA, rel=1e-7)
    assert torch.equal(grads[1 - side], torch.zeros(rows, 24))  # type: ignore[arg-type]


def test_rows_that_are_the_same_everywhere_have_no_correlation() -> None:
    """Of the uniform side, whose gradient is the other's distance from its mean, over ε."""
    student, teacher = 3 * torch.randn(6, 24), torch.zeros(6, 24)
    value, grad_student, grad_teacher = reference.dist_closed(student, teacher, BETA, 0.0, 2.0, True, True)
    assert value.item() == pytest.approx(BETA, rel=1e-7)
    assert torch.equal(grad_student, torch.zeros(6, 24))  # type: ignore[arg-type]
    leaf = teacher.double().requires_grad_()
    (want,) = torch.autograd.grad(reference.dist(student.double(), leaf, BETA, 0.0, 2.0) / 4, leaf)
    assert grad_teacher is not None
    assert float((grad_teacher - 2 * want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, -1])
@pytest.mark.parametrize("at", [0, 3, 18])
def test_a_nan_is_in_every_column(bits: int, at: int) -> None:
    value = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for role in (0, 1):
        logits = torch.randn(5, 19), torch.randn(5, 19)
        logits[role][2, at] = value
        for found in by_loop(*logits):
            assert found is not None
            assert bool(found.isnan().all())


def test_absent_classes_and_infinite_logits() -> None:
    student, teacher = torch.randn(6, 19), torch.randn(6, 19)
    student[1, 4], teacher[2, 18], student[:, 7] = -torch.inf, -torch.inf, -torch.inf
    student[3] *= 1e4
    assert_same(by_loop(student, teacher), by_definition(student, teacher))
    teacher[0, 0] = torch.inf
    assert all(x is not None and bool(x.isnan().all()) for x in by_loop(student, teacher))


def test_no_rows_and_no_classes_are_refused() -> None:
    for shape in ([0, 5, 5, 5], [3, 0, 1, 1]):
        with pytest.raises(ValueError, match="rows, classes"):
            extension().dist_loss(shape, 0, 0, 1.0, 1.0, 1.0, 0, 0, 1)
