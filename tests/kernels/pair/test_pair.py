"""JSD, decoupled KD, DIST, cached top-k teachers: conformance, published forms, limits, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdfast.functional import dkd_loss, jsd_loss, kd_kl_div
from kdfast.ops import pair as ops
from kdfast.ops.common.row_loss import Row, flatten
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose, reduced


def jsd_oracle(
    student: torch.Tensor,
    teacher: torch.Tensor,
    beta: float,
    temperature: float,
    dim: int = -1,
    reduction: str = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The published form: two KL divergences to the mixture, in log space."""
    log_q, log_p = F.log_softmax(student / temperature, dim), F.log_softmax(teacher / temperature, dim)
    log_m = torch.logaddexp(log_q + math.log(1 - beta), log_p + math.log(beta))
    to_mixture = [F.kl_div(log_m, x, reduction="none", log_target=True).sum(dim) for x in (log_p, log_q)]
    rows = (beta * to_mixture[0] + (1 - beta) * to_mixture[1]) * temperature**2
    return reduced(rows, reduction, student.shape, row_weight, mask)


def dkd_oracle(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    dim: int = -1,
    reduction: str = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The published form: probabilities gathered and summed, and the target class removed."""
    student, teacher = student.movedim(dim, -1), teacher.movedim(dim, -1)
    shape = student.movedim(-1, dim).shape
    hot = F.one_hot(target, student.shape[-1]).bool()
    q, p = (F.softmax(x / temperature, -1) for x in (student, teacher))
    b_s, b_t = (torch.stack([x[hot].view(target.shape), x.masked_fill(hot, 0).sum(-1)], -1) for x in (q, p))
    others = (*target.shape, student.shape[-1] - 1)
    rest = [x[~hot].view(others) / temperature for x in (student, teacher)]
    tckd = F.kl_div(b_s.log(), b_t, reduction="none").sum(-1)
    nckd = F.kl_div(F.log_softmax(rest[0], -1), F.softmax(rest[1], -1), reduction="none").sum(-1)
    rows = (alpha * tckd + beta * nckd) * temperature**2
    return reduced(rows, reduction, shape, row_weight, mask)


def pair(generator: torch.Generator, shape: tuple[int, ...], spread: float = 4.0) -> dict[str, torch.Tensor]:
    return {key: spread * torch.randn(shape, generator=generator) for key in ("student", "teacher")}


def weighted(dim: int) -> Any:
    def make(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        made = pair(generator, shape)
        rows = tuple(size for axis, size in enumerate(shape) if axis != dim % len(shape))
        made["row_weight"] = torch.rand(rows, generator=generator)
        made["mask"] = torch.rand(rows, generator=generator) > 0.4
        return made

    return make


def labelled(make: Any, dim: int = -1) -> Any:
    def made(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = make(generator, shape)
        rows = tuple(size for axis, size in enumerate(shape) if axis != dim % len(shape))
        inputs["target"] = torch.randint(shape[dim], rows, generator=generator)
        return inputs

    return made


def case(
    name: str,
    loss: Any,
    oracle: Any,
    shapes: list[tuple[int, ...]],
    small: list[tuple[int, ...]],
    make: Any = pair,
    tolerance: tuple[float, float] = (3e-5, 5e-6),
    **options: Any,
) -> OpCase:
    dtypes = options.pop("dtypes", DTYPES)
    row_loss = getattr(ops, loss.__name__.removesuffix("_loss"))

    def checked(inputs: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...]]:
        leaves = [inputs[key].requires_grad_() for key in ("student", "teacher")]
        dim = options.get("dim", -1) % leaves[0].dim()
        numbers = (options.get("alpha", 0.0), options["beta"])
        reduce = options.get("reduction", "batchmean") != "none"
        row = Row(numbers, dim, 2.0, None, None, 2.0, reduce, inputs.get("target"))
        return row_loss.op, (*leaves, *flatten(row))

    return OpCase(
        name=name,
        make=make,
        run=lambda **kw: loss(**kw, **options),
        oracle=lambda **kw: oracle(**kw, **options),
        shapes=shapes,
        small_shapes=small,
        differentiable=("student", "teacher"),
        cast=("student", "teacher"),
        dtypes=dtypes,
        launches=1,
        tolerances={torch.float32: tolerance},
        opcheck=checked,
        empty_shape=(0, *shapes[0][1:]) if options.get("reduction") == "sum" else None,
    )


WIDE = (torch.float32, torch.float64)
DTYPES = (*WIDE, torch.bfloat16, torch.float16)
JSD = {"beta": 0.3, "temperature": 2.5}
DKD = {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}
LONG = (5e-4, 5e-5)  # a log-sum-exp of 20,000 terms rounds

# 10 and 19 classes: odd enough to break 16-byte loads; 1000: ImageNet; 3000: one row a program; 20000: does not
# fit on the chip; 300 across: class dimension 1 beyond the tile that holds it.
CASES = [
    case(
        "jsd",
        jsd_loss,
        jsd_oracle,
        [(17, 10), (5, 19), (3, 1), (64, 1000)],
        [(5, 10), (3, 19), (2, 1)],
        reduction="sum",
        **JSD,
    ),
    case(
        "jsd_skewed", jsd_loss, jsd_oracle, [(3, 5)], [(3, 5)], beta=0.95, temperature=1.0, reduction="mean"
    ),
    case(
        "jsd_even",
        jsd_loss,
        jsd_oracle,
        [(7, 19), (5, 50)],
        [(3, 5)],
        beta=0.5,
        temperature=2.0,
        reduction="sum",
    ),
    case("jsd_rows", jsd_loss, jsd_oracle, [(9, 50), (2, 4, 21)], [(3, 50)], reduction="none", **JSD),
    case(
        "jsd_long",
        jsd_loss,
        jsd_oracle,
        [(3, 3000), (2, 20_000)],
        [(1, 3000), (2, 8200)],
        tolerance=LONG,
        dtypes=WIDE,
        **JSD,
    ),
    case("jsd_pixels", jsd_loss, jsd_oracle, [(2, 19, 13, 11), (1, 300, 4, 5)], [(2, 7, 3, 5)], dim=1, **JSD),
    case(
        "jsd_weighted",
        jsd_loss,
        jsd_oracle,
        [(16, 12), (3, 5, 7, 4)],
        [(3, 5, 3, 4)],
        make=weighted(1),
        dim=1,
        reduction="rowmean",
        **JSD,
    ),
    case(
        "dkd",
        dkd_loss,
        dkd_oracle,
        [(17, 10), (5, 19), (3, 2), (64, 1000)],
        [(5, 10), (3, 19), (2, 2), (5, 130)],
        make=labelled(pair),
        reduction="sum",
        **DKD,
    ),
    case(
        "dkd_rows",
        dkd_loss,
        dkd_oracle,
        [(9, 50), (2, 4, 21)],
        [(3, 50), (2, 2, 70)],
        make=labelled(pair),
        reduction="none",
        **DKD,
    ),
    case(
        "dkd_long",
        dkd_loss,
        dkd_oracle,
        [(3, 3000), (2, 20_000)],
        [(1, 3000), (2, 8200)],
        make=labelled(pair),
        tolerance=LONG,
        dtypes=WIDE,
        **DKD,
    ),
    case(
        "dkd_pixels",
        dkd_loss,
        dkd_oracle,
        [(2, 19, 13, 11), (1, 300, 4, 5)],
        [(2, 7, 3, 5)],
        make=labelled(pair, 1),
        dim=1,
        **DKD,
    ),
    case(
        "dkd_weighted",
        dkd_loss,
        dkd_oracle,
        [(16, 12), (3, 5, 7, 4)],
        [(3, 5, 3, 4)],
        make=labelled(weighted(1), 1),
        dim=1,
        reduction="rowmean",
        **DKD,
    ),
]


class TestConformance(ConformanceSuite):
    cases = CASES


def logits(*shape: int, spread: float = 3.0, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    made = pair(torch.Generator().manual_seed(3), shape, spread)
    return made["student"].to(device), made["teacher"].to(device)


def classes(*rows: int, below: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(below, rows, generator=torch.Generator().manual_seed(4)).to(device)


def both_gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


#: Every loss of two logit tensors, with its options fixed: what holds for one has to hold for all.
def jsd_of(s: torch.Tensor, t: torch.Tensor, **options: Any) -> torch.Tensor:
    return jsd_loss(s, t, beta=0.3, temperature=2.0, **options)


def dkd_of(s: torch.Tensor, t: torch.Tensor, **options: Any) -> torch.Tensor:
    return dkd_loss(
        s, t, classes(*s.shape[:-1], below=s.shape[-1], device=s.device.type), temperature=2.0, **options
    )


def jsd_exact(s: torch.Tensor, t: torch.Tensor, **options: Any) -> torch.Tensor:
    return jsd_oracle(s, t, 0.3, 2.0, **options)


def dkd_exact(s: torch.Tensor, t: torch.Tensor, **options: Any) -> torch.Tensor:
    return dkd_oracle(s, t, classes(*s.shape[:-1], below=s.shape[-1]), 1.0, 8.0, 2.0, **options)


PAIRED = pytest.mark.parametrize(
    "loss, exact", [pytest.param(jsd_of, jsd_exact, id="jsd"), pytest.param(dkd_of, dkd_exact, id="dkd")]
)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_ends_are_forward_and_reverse_kl(target: Target, beta: float) -> None:
    s, t = (x.requires_grad_() for x in logits(5, 17, device=target.device))
    got = jsd_loss(s, t, beta=beta, temperature=3.0)
    want = kd_kl_div(s, t, 3.0) if beta == 0.0 else kd_kl_div(t, s, 3.0)
    assert torch.equal(got, want)
    for g, w in zip(both_gradients(got, s, t), both_gradients(want, s, t), strict=True):
        assert torch.equal(g, w)


@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
def test_jsd_over_beta_tends_to_its_ends() -> None:
    s, t = (x.double() for x in logits(4, 9))
    for beta, end in [(1e-6, kd_kl_div(s, t, 2.0)), (1 - 1e-6, kd_kl_div(t, s, 2.0))]:
        limit = jsd_loss(s, t, beta=beta, temperature=2.0) / (beta * (1 - beta))
        torch.testing.assert_close(limit, end, rtol=1e-3, atol=0.0)


def test_jsd_is_symmetric_and_bounded(target: Target) -> None:
    s, t = logits(6, 12, spread=40.0, device=target.device)
    rows = jsd_loss(s, t, beta=0.2, reduction="none")
    torch.testing.assert_close(rows, jsd_loss(t, s, beta=0.8, reduction="none"), rtol=1e-5, atol=1e-7)
    entropy = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert bool((rows <= entropy * (1 + 1e-5)).all())
    assert bool((rows > 0).all())


def test_dkd_parts_recompose_the_kl(target: Target) -> None:
    """Zhao et al. 2022, Eq. 6: KL = TCKD + (1 - p_y)·NCKD."""
    s, t = logits(7, 11, device=target.device)
    y = classes(7, below=11, device=target.device)
    tckd = dkd_loss(s, t, y, alpha=1.0, beta=0.0, temperature=2.0, reduction="none")
    nckd = dkd_loss(s, t, y, alpha=0.0, beta=1.0, temperature=2.0, reduction="none")
    rest = 1 - F.softmax(t / 2, -1).gather(-1, y[:, None])[:, 0]
    torch.testing.assert_close(
        tckd + rest * nckd, kd_kl_div(s, t, 2.0, reduction="none"), rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("reduction", ["rowmean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("classes_", [6, 100, 9000])  # in registers, and read again and again
@pytest.mark.parametrize("ignore", [-100, 3])
def test_dkd_ignores_rows(target: Target, reduction: Any, classes_: int, ignore: int) -> None:
    s, t = logits(5, classes_, device=target.device)
    s[1] = math.nan
    y = torch.tensor([0, ignore, 2, 5, ignore], device=s.device)
    mask = torch.tensor([True, True, False, True, True], device=s.device)
    s.requires_grad_()
    loss = dkd_loss(s, t, y, reduction=reduction, ignore_index=ignore, mask=mask)
    (grad,) = both_gradients(loss.sum(), s)
    keep, out = [0, 3], [1, 2, 4]
    kept = s.detach()[keep].requires_grad_()
    wanted = dkd_loss(kept, t[keep], y[keep], reduction=reduction)
    (wanted_grad,) = both_gradients(wanted.sum(), kept)
    if reduction == "none":
        assert torch.equal(loss[out], torch.zeros_like(loss[out]))
        loss = loss[keep]
    share = 2 / 5 if reduction == "batchmean" else 1.0  # batchmean counts rows that are left out
    torch.testing.assert_close(loss, wanted * share)
    torch.testing.assert_close(grad[keep], wanted_grad * share)
    assert torch.equal(grad[out], torch.zeros_like(grad[out]))


@pytest.mark.parametrize("classes_", [5, 70])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_dkd_with_nan_at_the_target_is_nan(target: Target, where: str, classes_: int) -> None:
    """In its row only, on every backend."""
    s, t = logits(2, classes_, device=target.device)
    (s if where == "student" else t)[0, 0] = math.nan
    y = torch.zeros(2, dtype=torch.int64, device=s.device)
    leaf = s.clone().requires_grad_()
    rows = dkd_loss(leaf, t, y, temperature=1.0, reduction="none")
    assert rows[0].isnan()
    assert rows[1].isfinite()
    (grad,) = both_gradients(rows.nan_to_num().sum() if where == "teacher" else rows.sum(), leaf)
    assert grad[1].isfinite().all()


@PAIRED
@pytest.mark.parametrize("num_classes", [10, 1000, 20_000])
@pytest.mark.parametrize("apart", [1e-2, 1e-4])
def test_near_equal_logits_keep_their_digits(
    target: Target, loss: Any, exact: Any, num_classes: int, apart: float
) -> None:
    generator = torch.Generator().manual_seed(5)
    t = 3 * torch.randn(2, num_classes, generator=generator)
    s = (t + apart * torch.randn(2, num_classes, generator=generator)).to(target.device).requires_grad_()
    got = loss(s, t.to(target.device), reduction="sum")
    (grad,) = both_gradients(got, s)
    s64 = s.detach().double().cpu().requires_grad_()
    want = exact(s64, t.double(), reduction="sum")
    (want_grad,) = both_gradients(want, s64)
    assert abs(got.item() / want.item() - 1) < (3e-3 if apart > 1e-3 else 5e-2)
    if target.backend == "triton":  # the reference's gradient comes from autograd
        assert (grad.double().cpu() - want_grad).norm() / want_grad.norm() < 3e-3


@PAIRED
def test_absent_classes_give_no_nan(target: Target, loss: Any, exact: Any) -> None:
    """Classes that both networks mask are as if they were not there."""
    s, t = logits(4, 12, device=target.device)
    keep = slice(0, 9)
    y = classes(4, below=9, device=target.device)
    s[:, 9:] = t[:, 9:] = -math.inf
    s, t = s.requires_grad_(), t.requires_grad_()

    def call(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if loss is jsd_of:
            return jsd_of(a, b, reduction="sum")
        return dkd_loss(a, b, y, temperature=2.0, reduction="sum")

    got, want = call(s, t), call(s[:, keep], t[:, keep])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for g, w in zip(both_gradients(got, s, t), both_gradients(want, s, t), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_jsd_with_a_class_absent_on_one_side_is_finite(target: Target) -> None:
    s, t = logits(3, 7, device=target.device)
    s[:, 2] = -math.inf
    t[:, 4] = -math.inf
    s, t = s.requires_grad_(), t.requires_grad_()
    got = jsd_loss(s, t, beta=0.4, reduction="sum")
    q, p = (F.softmax(x.detach().double().cpu(), -1) for x in (s, t))
    m = 0.4 * p + 0.6 * q
    want = (0.4 * torch.special.xlogy(p, p / m) + 0.6 * torch.special.xlogy(q, q / m)).sum()
    assert_verbose_allclose(got, want, rtol=1e-5, atol=1e-6)
    for grad in both_gradients(got, s, t):
        assert grad.isfinite().all()


@PAIRED
def test_backward_repeats_and_applies_the_upstream_gradient(target: Target, loss: Any, exact: Any) -> None:
    s, t = (x.requires_grad_() for x in logits(6, 33, device=target.device))
    hidden = s * 1, t * 1  # not leaves: autograd hands the buffers over as they are
    value = loss(*hidden, reduction="sum")
    first = torch.autograd.grad(value, hidden, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(value, hidden, torch.tensor(5.0, device=s.device), retain_graph=True)
    third = torch.autograd.grad(value, hidden)
    for one, copied, five, again in zip(first, kept, second, third, strict=True):
        assert torch.equal(one, copied)
        torch.testing.assert_close(five, 5 * one, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(again, one, rtol=1e-6, atol=1e-8)


@PAIRED
def test_double_backward(target: Target, loss: Any, exact: Any) -> None:
    s, t = (x.requires_grad_() for x in logits(3, 5, device=target.device))

    def penalty(a: torch.Tensor, b: torch.Tensor, of: Any) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(of(a, b, reduction="sum") * 3, [a, b], create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), [a, b])

    s64, t64 = (x.detach().double().cpu().requires_grad_() for x in (s, t))
    for g, w in zip(penalty(s, t, loss), penalty(s64, t64, exact), strict=True):
        assert_verbose_allclose(g, w, rtol=2e-4, atol=2e-5)


@PAIRED
def test_all_rows_masked_is_zero(target: Target, loss: Any, exact: Any) -> None:
    s, t = logits(3, 6, device=target.device)
    s[1] = math.nan  # a masked row may hold anything
    s, t = s.requires_grad_(), t.requires_grad_()
    value = loss(s, t, reduction="rowmean", mask=torch.zeros(3, dtype=torch.bool, device=s.device))
    assert torch.equal(value, torch.zeros_like(value))
    for grad in both_gradients(value, s, t):
        assert torch.equal(grad, torch.zeros_like(grad))


@PAIRED
@pytest.mark.parametrize("reduction", ["batchmean", pytest.param("none", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(target: Target, loss: Any, exact: Any, reduction: str) -> None:
    s, t = (x.requires_grad_() for x in logits(4, 9, device=target.device))
    y = classes(4, below=9, device=target.device)

    def call(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if loss is jsd_of:
            return jsd_of(a * 1.5, b, reduction=reduction).sum()
        return dkd_loss(a * 1.5, b, y, reduction=reduction).sum()

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for g, w in zip(both_gradients(compiled(s, t), s, t), both_gradients(call(s, t), s, t), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


@PAIRED
def test_temperature_as_a_tensor_and_three_groups_of_strides(target: Target, loss: Any, exact: Any) -> None:
    s, t = logits(2, 3, 2, 2, 4, device=target.device)
    moved = s.permute(3, 1, 2, 0, 4).contiguous().permute(3, 1, 2, 0, 4)
    moved, s = moved.detach().requires_grad_(), s.requires_grad_()
    got, want = loss(moved, t), loss(s, t)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(both_gradients(got, moved), both_gradients(want, s), rtol=1e-5, atol=1e-7)
    heat = torch.tensor(2.0, device=s.device)
    assert torch.equal(jsd_loss(s, t, beta=0.3, temperature=heat), jsd_of(s, t))
