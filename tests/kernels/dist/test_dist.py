"""dist_loss: conformance, the published form, invariances, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdfast.functional import dist_loss
from kdfast.nn import DISTLoss
from kdfast.ops import dist as ops
from kdfast.ops.common.row_loss import Row, flatten
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose
from tests.conftest import INTERPRETING, Target


def oracle(
    student: torch.Tensor, teacher: torch.Tensor, beta: float, gamma: float, temperature: float, dim: int = -1
) -> torch.Tensor:
    """The published form: the cosine of what is left after the mean is taken off, rows first, then columns."""
    q, p = (F.softmax(x.movedim(dim, -1).flatten(0, -2) / temperature, 1) for x in (student, teacher))

    def apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    return temperature**2 * (beta * apart(q, p) + gamma * apart(q.T, p.T))


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pair(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {key: 2 * torch.randn(shape, generator=generator) for key in ("student", "teacher")}


def case(name: str, shapes: list[tuple[int, ...]], small: list[tuple[int, ...]], **options: Any) -> OpCase:
    dtypes = options.pop("dtypes", DTYPES)
    options = {"beta": 1.5, "gamma": 0.7, "temperature": 2.0, **options}

    def checked(inputs: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...]]:
        leaves = [inputs[key].requires_grad_() for key in ("student", "teacher")]
        row = Row((1.5, 0.7), leaves[0].dim() - 1, 2.0, None, None, 1.0, True)
        return ops.dist.op, (*leaves, *flatten(row))

    return OpCase(
        name=name,
        make=pair,
        run=lambda **kw: dist_loss(**kw, **options),
        oracle=lambda **kw: oracle(**kw, **options),
        shapes=shapes,
        small_shapes=small,
        differentiable=("student", "teacher"),
        cast=("student", "teacher"),
        dtypes=dtypes,
        launches=3,
        tolerances={torch.float32: (1e-4, 2e-5), torch.bfloat16: (2e-2, 5e-3)},
        opcheck=checked,
    )


# 70 columns: more than one group; 300 rows: more than one split; 2100 classes: more than one block.
CASES = [
    case("rows", [(17, 10), (5, 19), (300, 70)], [(9, 10), (140, 70)]),
    case("many_classes", [(6, 2100)], [(3, 2100)], dtypes=(torch.float32, torch.float64)),
    case("pixels", [(2, 19, 7, 5)], [(2, 5, 3, 4)], dim=1),
    case("sequence", [(3, 7, 33)], [(2, 3, 9)], gamma=0.0),
    case("columns_only", [(33, 12)], [(5, 6)], beta=0.0),
]


class TestConformance(ConformanceSuite):
    cases = CASES


def draw(*shape: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    made = pair(torch.Generator().manual_seed(3), shape)
    return made["student"].to(device), made["teacher"].to(device)


def test_equal_logits_have_no_distance_and_no_gradient(target: Target) -> None:
    s, t = draw(12, 9, device=target.device)
    s = (t + torch.arange(12, device=t.device)[:, None]).requires_grad_()  # a softmax does not see the shift
    loss = dist_loss(s, t, temperature=3.0)
    (grad,) = torch.autograd.grad(loss, s)
    assert abs(loss.item()) < 1e-5
    assert float(grad.abs().max()) < 1e-5


def test_one_sample_has_no_intra_class_correlation(target: Target) -> None:
    s, t = draw(1, 9, device=target.device)
    s.requires_grad_()
    loss = dist_loss(s, t, beta=0.0, gamma=1.0)
    (grad,) = torch.autograd.grad(loss, s)
    assert loss.item() == pytest.approx(1.0)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_order_of_samples_does_not_matter(target: Target) -> None:
    s, t = draw(37, 8, device=target.device)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0)).to(s.device)
    torch.testing.assert_close(dist_loss(s[order], t[order]), dist_loss(s, t), rtol=1e-5, atol=1e-6)


def distance(target: Target, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns' distance and its error in float64."""
    got = dist_loss(s.to(target.device), t.to(target.device), beta=0.0, gamma=1.0).cpu().double()
    want = oracle(s.double(), t.double(), 0.0, 1.0, 1.0)
    return got, (got - want).abs()


@pytest.mark.parametrize("first", [64, 1, 299])
def test_rows_in_the_order_of_their_classes(target: Target, first: int) -> None:
    """The first rows say nothing of those that come after them: 64 of them are what a kernel's column begins with."""
    s, t = draw(300, 16)
    for x, by in ((s, 9.0), (t, 7.0)):
        x[:first, 0] += by
        x[first:, 1] += by
    value, error = distance(target, s, t)
    assert float(value) > 1e-3
    assert float(error) < 2e-6


def test_probabilities_that_hardly_vary(target: Target) -> None:
    """At a high temperature by a hundredth of what they are: sums of squares would say nothing of their variance."""
    s, t = (x.to(target.device) for x in draw(300, 16))
    t = s + t
    want = oracle(s.double(), t.double(), 0.0, 1.0, 300.0)
    torch.testing.assert_close(
        dist_loss(s, t, beta=0.0, gamma=1.0, temperature=300.0).double(), want, rtol=3e-6, atol=0
    )


def test_more_stretches_of_rows_than_are_merged_at_a_time(target: Target) -> None:
    """17 000 rows of three classes are 34 stretches for two turns; the last has fewer rows than the others."""
    s, t = draw(17_000, 3)
    s[9_000:] += torch.tensor([0.0, 4.0, -4.0])
    value, error = distance(target, s, t)
    assert float(value) > 0.1
    assert float(error) < 3e-6


def test_classes_of_the_same_probability_in_every_row(target: Target) -> None:
    """Their variance is what rounding leaves of 0: no correlation, and no square root of less than nothing."""
    for rows in range(1, 70, 3):
        s, t = (x[:1].repeat(rows, 1) for x in draw(2, 9))
        value, error = distance(target, s, t)
        assert float(value) == pytest.approx(1.0)
        assert float(error) < 1e-6, rows


def test_backward_repeats_and_applies_the_upstream_gradient(target: Target) -> None:
    s, t = (x.requires_grad_() for x in draw(6, 11, device=target.device))
    hidden = s * 1, t * 1
    value = dist_loss(*hidden, temperature=2.0)
    first = torch.autograd.grad(value, hidden, retain_graph=True)
    kept = [g.clone() for g in first]
    five = torch.autograd.grad(value, hidden, torch.tensor(5.0, device=s.device), retain_graph=True)
    again = torch.autograd.grad(value, hidden)
    for one, copy, fivefold, third in zip(first, kept, five, again, strict=True):
        assert torch.equal(one, copy)
        torch.testing.assert_close(fivefold, 5 * one, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(third, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dim", "before"), [(-1, "AccumulateGrad"), (1, "AccumulateGrad"), (0, "Permute")])
def test_classes_that_are_last_are_no_view(target: Target, dim: int, before: str) -> None:
    """A view would be an operator of the forward, and one of the backward."""
    student, teacher = (torch.randn(6, 5, device=target.device, requires_grad=True) for _ in range(2))
    node = dist_loss(student, teacher, dim=dim).grad_fn.next_functions[0][0]
    assert before in node.name()


def test_double_backward(target: Target) -> None:
    s, t = (x.requires_grad_() for x in draw(4, 5, device=target.device))

    def penalty(a: torch.Tensor, b: torch.Tensor, of: Any) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(of(a, b, beta=1.0, gamma=2.0, temperature=2.0), [a, b], create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), [a, b])

    s64, t64 = (x.detach().double().cpu().requires_grad_() for x in (s, t))
    for g, w in zip(penalty(s, t, dist_loss), penalty(s64, t64, oracle), strict=True):
        assert_verbose_allclose(g, w, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
def test_gradcheck_in_float64() -> None:
    s, t = (x.double().requires_grad_() for x in draw(4, 5))
    assert torch.autograd.gradcheck(lambda a, b: dist_loss(a, b, gamma=2.0, temperature=2.0), (s, t))


def test_compiles_into_one_graph(target: Target) -> None:
    s, t = (x.requires_grad_() for x in draw(4, 9, device=target.device))
    torch.compiler.reset()
    compiled = torch.compile(lambda a, b: dist_loss(a * 1.5, b), fullgraph=True, backend="aot_eager")
    got, want = compiled(s, t), dist_loss(s * 1.5, t)
    for g, w in zip(torch.autograd.grad(got, [s, t]), torch.autograd.grad(want, [s, t]), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


S = torch.zeros(4, 5)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (ValueError, "beta: got -1", lambda: dist_loss(S, S, beta=-1.0)),
        (TypeError, "gamma: got str", lambda: dist_loss(S, S, gamma="1")),
        (ValueError, "temperature: got 0", lambda: dist_loss(S, S, temperature=0)),
        (ValueError, "dim: got 2", lambda: dist_loss(S, S, dim=2)),
        (ValueError, "1-d logits", lambda: dist_loss(S[0], S[0])),
        (ValueError, "at least one sample", lambda: dist_loss(S[:0], S[:0])),
        (ValueError, "teacher: got shape", lambda: dist_loss(S, S[:3])),
        (TypeError, "teacher: got dtype", lambda: dist_loss(S, S.long())),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()


def test_the_module_is_the_function(target: Target) -> None:
    s, t = draw(4, 7, device=target.device)
    assert torch.equal(DISTLoss(2.0, 3.0, 4.0)(s, t), dist_loss(s, t, beta=2.0, gamma=3.0, temperature=4.0))
    assert "gamma=3.0" in repr(DISTLoss(2.0, 3.0))
