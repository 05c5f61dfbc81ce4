"""divergence_loss: each kind against its definition in float64, near-equal, extreme and absent classes, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdfast.functional import divergence_loss, jsd_loss, kd_kl_div
from kdfast.nn import DivergenceLoss
from kdfast.ops import pair as ops
from kdfast.ops.common.row_loss import Row, flatten
from kdfast.reference.pair import KINDS
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose, reduced

#: Every kind, with a number where it takes one.
CALLS: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {},
    "jsd": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.3},
    "total_variation": {},
    "alpha": {"alpha": 0.4},
    "triangular": {},
    "ab": {"alpha": 0.3, "beta": 0.7},
}
MORE_ALPHAS = [-0.7, 0.5, 1.6, 2.0]
MORE_AB = [(0.05, 0.05), (0.05, 2.0), (1.0, 1.0), (2.0, 2.0), (0.2, 0.7)]


def xlogy(x: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x * ratio.clamp(min=1e-300).log(), torch.zeros_like(x))


def oracle(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    beta: float = 0.5,
    alpha: float = 0.5,
    dim: int = -1,
    reduction: str = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definitions over probabilities, not their logarithms."""
    q = F.softmax(student / temperature, dim)
    p = F.softmax(teacher / (teacher_temperature or temperature), dim)
    m = {"jsd": beta * p + (1 - beta) * q, "skew_forward_kl": alpha * p + (1 - alpha) * q}.get(
        kind, (1 - alpha) * p + alpha * q
    )
    both = alpha + beta
    terms = {
        "forward_kl": lambda: xlogy(p, p / q),
        "reverse_kl": lambda: xlogy(q, q / p),
        "jeffreys": lambda: xlogy(p, p / q) + xlogy(q, q / p),
        "jsd": lambda: beta * xlogy(p, p / m) + (1 - beta) * xlogy(q, q / m),
        "skew_forward_kl": lambda: xlogy(p, p / m),
        "skew_reverse_kl": lambda: xlogy(q, q / m),
        "total_variation": lambda: (p - q).abs() / 2,
        "alpha": lambda: (p**alpha * q ** (1 - alpha) - alpha * p - (1 - alpha) * q) / (alpha * (alpha - 1)),
        "triangular": lambda: torch.where(p + q > 0, (p - q) ** 2 / (p + q).clamp(min=1e-300), 0.0),
        "ab": lambda: (alpha * p**both / both + beta * q**both / both - p**alpha * q**beta) / (alpha * beta),
    }[kind]()
    rows = terms.sum(dim) * temperature**2
    return reduced(rows, reduction, student.shape, row_weight, mask)


def pair(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {key: 2 * torch.randn(shape, generator=generator) for key in ("student", "teacher")}


def weighted(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    made = pair(generator, shape)
    rows = (shape[0], *shape[2:])
    made["row_weight"] = torch.rand(rows, generator=generator)
    made["mask"] = torch.rand(rows, generator=generator) > 0.4
    return made


def case(name: str, kind: str, shapes: Any, small: Any, make: Any = pair, **options: Any) -> OpCase:
    options = {"kind": kind, "temperature": 2.5, **CALLS[kind], **options}

    def checked(inputs: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...]]:
        leaves = [inputs[key].requires_grad_() for key in ("student", "teacher")]
        numbers = (float(KINDS.index(kind)), 0.4, 0.3, 1.0)
        return ops.divergence.op, (*leaves, *flatten(Row(numbers, 1, 2.0, None, None, 2.0, True)))

    return OpCase(
        name=name,
        make=make,
        run=lambda **kw: divergence_loss(**kw, **options),
        oracle=lambda **kw: oracle(**kw, **options),
        shapes=shapes,
        small_shapes=small,
        differentiable=("student", "teacher"),
        cast=("student", "teacher"),
        launches=1,
        # float64 is computed in float64: the oracle's own rounding is what differs.
        tolerances={
            torch.float32: (5e-4, 5e-5) if "long" in name else (3e-5, 5e-6),
            torch.float64: (1e-9, 1e-10),
        },
        opcheck=checked,
        empty_shape=(0, 5) if options.get("reduction") == "sum" else None,
    )


NEW = ("jeffreys", "skew_forward_kl", "skew_reverse_kl", "total_variation", "alpha", "triangular", "ab")
CASES = [
    *(case(kind, kind, [(17, 10), (3, 1), (9, 1000)], [(5, 10), (2, 1)], reduction="sum") for kind in CALLS),
    *(
        case(f"{kind}_teacher_temperature", kind, [(5, 19)], [(3, 19)], teacher_temperature=1.5)
        for kind in CALLS
    ),
    # 9000 classes do not fit on the chip: the loop; with both gradients neither do 5000.
    *(case(f"{kind}_long", kind, [(2, 9000)], [(1, 4200)], reduction="none") for kind in NEW),
    case("pixels", "skew_reverse_kl", [(2, 19, 13, 11)], [(2, 7, 3, 5)], dim=1),
    case("weighted", "alpha", [(3, 5, 7, 4)], [(3, 5, 3, 4)], weighted, dim=1, reduction="rowmean"),
]


class TestConformance(ConformanceSuite):
    cases = CASES


def draw(*shape: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return spread * torch.randn(shape, generator=generator), spread * torch.randn(shape, generator=generator)


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


KIND = pytest.mark.parametrize("kind", CALLS)


@pytest.mark.parametrize("alpha", MORE_ALPHAS)
def test_alpha_divergences(target: Target, alpha: float) -> None:
    s, t = (x.to(target.device).requires_grad_() for x in draw(4, 21, spread=1.0))
    got = divergence_loss(s, t, kind="alpha", alpha=alpha)
    s64, t64 = (x.detach().double().cpu().requires_grad_() for x in (s, t))
    want = oracle(s64, t64, "alpha", alpha=alpha)
    assert_verbose_allclose(got, want, rtol=3e-5, atol=0)
    for g, w in zip(gradients(got, s, t), gradients(want, s64, t64), strict=True):
        assert_verbose_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha, beta", MORE_AB)
@pytest.mark.parametrize("spread", [1.0, 0.02, 40.0])
def test_ab_divergences(target: Target, alpha: float, beta: float, spread: float) -> None:
    """Far apart, a probability underflows in float32 where its small power still counts."""
    s, t = (x.to(target.device).requires_grad_() for x in draw(4, 21, spread=spread))
    got = divergence_loss(s, t, kind="ab", alpha=alpha, beta=beta)
    s64, t64 = (x.detach().double().cpu().requires_grad_() for x in (s, t))
    want = oracle(s64, t64, "ab", alpha=alpha, beta=beta)
    assert_verbose_allclose(got, want, rtol=2e-4 if spread < 1 else 3e-5, atol=0)
    for g, w in zip(gradients(got, s, t), gradients(want, s64, t64), strict=True):
        # What is left of a row whose student is sure of one class is what float32 rounds beside 1.
        assert (g.double().cpu() - w).norm() < (2e-3 if spread < 1 else 1e-4) * w.norm() + 1e-7


@KIND
@pytest.mark.parametrize("apart", [1e-2, 1e-4])
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_near_equal_logits_keep_their_digits(
    target: Target, kind: str, apart: float, num_classes: int
) -> None:
    t, noise = draw(2, num_classes)
    s = (t + apart * noise / 3).to(target.device).requires_grad_()
    t = t.to(target.device).requires_grad_()
    got = divergence_loss(s, t, kind=kind, teacher_temperature=None, reduction="sum", **CALLS[kind])
    s64, t64 = (x.detach().double().cpu().requires_grad_() for x in (s, t))
    want = oracle(s64, t64, kind, reduction="sum", **CALLS[kind])
    # A total variation is of first order in what the log-sum-exps round, the others of second.
    limit = 3e-3 if apart > 1e-3 or kind != "total_variation" else 2e-2
    assert abs(got.item() / want.item() - 1) < limit
    if target.backend == "triton" or kind in NEW:
        for g, w in zip(gradients(got, s, t), gradients(want, s64, t64), strict=True):
            assert (g.double().cpu() - w).norm() / w.norm() < 1e-2


@KIND
@pytest.mark.parametrize("temperature, teacher_temperature", [(0.05, None), (1.0, None), (1.0, 0.5)])
def test_logits_of_ten_thousand(
    target: Target, kind: str, temperature: float, teacher_temperature: float | None
) -> None:
    """Beside ±1e4, differences of the order of the temperature: all of them have to survive."""
    small, other = draw(3, 9, spread=2.0 * temperature)
    # Eighths of thousandths that float32 holds beside 1e4.
    s, t = ((x * 512).round() / 512 + 8192.0 for x in (small, other))
    s[:, 0] = t[:, 1] = -8192.0
    s[:, 2] = t[:, 2] = -8192.0
    finite = kind not in ("forward_kl", "reverse_kl", "jeffreys")
    if not finite:
        s[:, 0], t[:, 1] = 8192.0, 8192.0
    options = {"temperature": temperature, "teacher_temperature": teacher_temperature, **CALLS[kind]}
    got = divergence_loss(s.to(target.device), t.to(target.device), kind=kind, reduction="none", **options)
    want = oracle(s.double(), t.double(), kind, reduction="none", **options)
    # kd_kl_div and jsd_loss scale before they subtract.
    loose = (kind in ("forward_kl", "reverse_kl") and teacher_temperature is None) or kind == "jsd"
    if loose or teacher_temperature is not None:
        limit = 5e-2
    else:
        limit = 2e-5 if target.backend == "triton" else 1e-6
    assert_verbose_allclose(got, want, rtol=limit, atol=1e-6)


@KIND
def test_absent_classes(target: Target, kind: str) -> None:
    """Absent on both sides: as if it were not there. On one: finite where the definition is, else infinite."""
    s, t = (x.to(target.device) for x in draw(3, 8))
    options = {"kind": kind, "reduction": "none", **CALLS[kind]}
    want = divergence_loss(s[:, :6], t[:, :6], **options)
    s[:, 6:] = t[:, 6:] = -math.inf
    a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
    got = divergence_loss(a, b, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(grad.isfinite().all() for grad in gradients(got.sum(), a, b))
    only_student, only_teacher = s.clone(), t.clone()
    only_student[0, 0] = only_teacher[1, 1] = -math.inf
    rows = divergence_loss(only_student, only_teacher, **options)
    infinite = {"forward_kl": [True, False], "reverse_kl": [False, True], "jeffreys": [True, True]}
    assert rows.isinf().tolist() == [*infinite.get(kind, [False, False]), False]
    assert not rows.isnan().any()
    (first, second), p_q = rows[:2], (only_teacher, only_student)
    exact = oracle(p_q[1].double().cpu(), p_q[0].double().cpu(), **options)
    for row, value in enumerate((first, second)):
        if value.isfinite():
            assert_verbose_allclose(value, exact[row], rtol=1e-5, atol=1e-6)


def test_kinds_meet_where_they_are_one(target: Target) -> None:
    s, t = (x.to(target.device) for x in draw(4, 11))
    forward, reverse = kd_kl_div(s, t, 2.0), kd_kl_div(t, s, 2.0)
    same = [
        (forward, {"kind": "forward_kl"}),
        (reverse, {"kind": "reverse_kl"}),
        (forward + reverse, {"kind": "jeffreys"}),
        (forward, {"kind": "jsd", "beta": 0.0}),
        (reverse, {"kind": "jsd", "beta": 1.0}),
        (jsd_loss(s, t, beta=0.3, temperature=2.0), {"kind": "jsd", "beta": 0.3}),
        (forward, {"kind": "skew_forward_kl", "alpha": 0.0}),
        (reverse, {"kind": "skew_reverse_kl", "alpha": 0.0}),
        (forward, {"kind": "alpha", "alpha": 1.0}),
        (reverse, {"kind": "alpha", "alpha": 0.0}),
        (
            divergence_loss(s, t, kind="alpha", alpha=0.3, temperature=2.0),
            {"kind": "ab", "alpha": 0.3, "beta": 0.7},
        ),
        (
            2 * (F.softmax(s / 2.0, -1) - F.softmax(t / 2.0, -1)).square().sum() / 4,
            {"kind": "ab", "alpha": 1.0, "beta": 1.0},
        ),
        (forward, {"kind": "forward_kl", "teacher_temperature": 2.0}),
        (kd_kl_div(s, t / 2, 2.0), {"kind": "forward_kl", "teacher_temperature": 4.0}),
    ]
    for want, options in same:
        torch.testing.assert_close(
            divergence_loss(s, t, temperature=2.0, **options), want, rtol=2e-5, atol=1e-6
        )


@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
@KIND
def test_gradcheck_in_float64(kind: str) -> None:
    s, t = (x.double().requires_grad_() for x in draw(2, 5, spread=1.0))

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return divergence_loss(a, b, kind=kind, temperature=2.0, teacher_temperature=1.5, **CALLS[kind])

    assert torch.autograd.gradcheck(loss, (s, t))


@KIND
def test_temperatures_as_tensors(target: Target, kind: str) -> None:
    s, t = (x.to(target.device) for x in draw(3, 7))
    options = {"kind": kind, **CALLS[kind]}
    heats = {"temperature": 2.0, "teacher_temperature": 3.0}
    tensors = {name: torch.tensor(value, device=target.device) for name, value in heats.items()}
    torch.testing.assert_close(
        divergence_loss(s, t, **tensors, **options), divergence_loss(s, t, **heats, **options)
    )


@pytest.mark.parametrize("kind", ["jeffreys", "alpha"])
def test_compiles_into_one_graph(target: Target, kind: str) -> None:
    s, t = (x.to(target.device).requires_grad_() for x in draw(4, 9))

    def call(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return divergence_loss(a * 1.5, b, kind=kind, teacher_temperature=2.0)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for g, w in zip(gradients(compiled(s, t), s, t), gradients(call(s, t), s, t), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


# Liger's grid (test_jsd.py, test_kl_div.py): batch, tokens, vocabulary; the odd ones break 16-byte loads.
LIGER = [(2, 4, 64), (41, 1, 401)]


@pytest.mark.parametrize("shape", LIGER)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "kind, options", [("jsd", {"beta": beta}) for beta in (0.1, 0.5, 0.9)] + [("forward_kl", {})]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ligers_grid(
    target: Target, shape: Any, temperature: float, kind: str, options: Any, dtype: Any
) -> None:
    rows = shape[0] * shape[1] if not INTERPRETING else 6
    s, t = (x.to(target.device, dtype).requires_grad_() for x in draw(rows, shape[2]))
    got = divergence_loss(s, t, kind=kind, temperature=temperature, **options)
    s64, t64 = (x.detach().double().cpu().requires_grad_() for x in (s, t))
    want = oracle(s64, t64, kind, temperature, **options)
    assert_verbose_allclose(got, want, rtol=2e-5, atol=1e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    for g, w in zip(gradients(got, s, t), gradients(want, s64, t64), strict=True):
        assert_verbose_allclose(g / w.abs().max(), w / w.abs().max(), rtol=tolerance, atol=tolerance / 10)


S = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "error, match, options",
    [
        (ValueError, "kind: got 'kl'", {"kind": "kl"}),
        (ValueError, "kind: got ", {"kind": torch.ones(2)}),
        (ValueError, "beta: got 1.5", {"kind": "jsd", "beta": 1.5}),
        (ValueError, "alpha: got 1.0", {"kind": "skew_forward_kl", "alpha": 1.0}),
        (ValueError, "alpha: got 3.0", {"kind": "alpha", "alpha": 3.0}),
        (ValueError, "alpha: got 0.001", {"kind": "alpha", "alpha": 0.001}),
        (TypeError, "alpha: got str", {"kind": "alpha", "alpha": "1"}),
        (ValueError, "alpha: got 0.01", {"kind": "ab", "alpha": 0.01}),
        (ValueError, "beta: got 2.5", {"kind": "ab", "beta": 2.5}),
        (ValueError, "teacher_temperature: got 0", {"teacher_temperature": 0.0}),
        (TypeError, "teacher_temperature: got str", {"teacher_temperature": "2"}),
        (ValueError, "reduction: got", {"reduction": "median"}),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, options: Any) -> None:
    with pytest.raises(error, match=match):
        divergence_loss(S, S, **options)


def test_the_module() -> None:
    s, t = draw(3, 5)
    module = DivergenceLoss("skew_reverse_kl", 2.0, alpha=0.1)
    assert torch.equal(
        module(s, t), divergence_loss(s, t, kind="skew_reverse_kl", temperature=2.0, alpha=0.1)
    )
    assert "kind='skew_reverse_kl'" in repr(module)
