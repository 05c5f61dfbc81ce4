"""kd_kl_div: conformance, and every trap that the peers fall into."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast
from kdfast.functional import kd_kl_div
from kdfast.nn import KDLoss
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose, reduced


def oracle(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float = 1.0,
    dim: int = -1,
    reduction: str = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, written with torch's own functions."""
    rows = F.kl_div(
        F.log_softmax(student / temperature, dim), F.softmax(teacher / temperature, dim), reduction="none"
    ).sum(dim) * (temperature * temperature)
    return reduced(rows, reduction, student.shape, row_weight, mask)


def logits(spread: float = 10.0) -> Any:
    def make(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {
            "student": spread * torch.randn(shape, generator=generator),
            "teacher": spread * torch.randn(shape, generator=generator),
        }

    return make


def weighted(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    made = logits()(generator, shape)
    rows = shape[:1] + shape[2:]
    made["row_weight"] = torch.rand(rows, generator=generator)
    made["mask"] = torch.rand(rows, generator=generator) > 0.4
    return made


def case(
    name: str, shapes: list[tuple[int, ...]], small: list[tuple[int, ...]], make: Any = None, **options: Any
) -> OpCase:
    temperature = options.pop("temperature", 2.5)
    tolerances = options.pop("tolerances", {torch.float32: (2e-5, 5e-6)})

    def checked(inputs: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...]]:
        from kdfast.ops.common.row_loss import Row, flatten
        from kdfast.ops.kl import kl

        leaves = [inputs[key].requires_grad_() for key in ("student", "teacher")]
        dim = options.get("dim", -1) % leaves[0].dim()
        reduce = options.get("reduction", "batchmean") != "none"
        return kl.op, (*leaves, *flatten(Row((), dim, temperature, None, None, 2.0, reduce)))

    return OpCase(
        name=name,
        make=make or logits(),
        run=lambda **kw: kd_kl_div(**kw, temperature=temperature, **options),
        oracle=lambda **kw: oracle(**kw, temperature=temperature, **options),
        shapes=shapes,
        small_shapes=small,
        differentiable=("student", "teacher"),
        cast=("student", "teacher"),
        launches=1,
        tolerances=tolerances,
        opcheck=checked,
        empty_shape=None if options.get("reduction", "batchmean") != "sum" else (0, *shapes[0][1:]),
    )


CASES = [
    # 10 and 19 classes: CIFAR-10 and Cityscapes, odd enough to break 16-byte loads; 1 class: KL is 0;
    # 1000: ImageNet; 3000: one row a program; 20000: does not fit on the chip.
    case("rows", [(17, 10), (5, 19), (3, 1), (64, 1000)], [(5, 10), (3, 19), (2, 1)], reduction="sum"),
    case("batchmean", [(9, 100)], [(3, 100)]),
    case("mean", [(9, 33)], [(3, 33)], reduction="mean"),
    case("per_row", [(9, 50), (2, 4, 21)], [(3, 50)], reduction="none"),
    case(
        "long_rows",
        [(3, 3000), (2, 20_000)],
        [(2, 3000), (2, 20_000)],
        reduction="sum",
        tolerances={torch.float32: (3e-4, 5e-5)},  # a log-sum-exp of 20,000 terms rounds
    ),
    case("pixels", [(2, 19, 13, 11), (1, 150, 8, 8)], [(2, 7, 3, 5)], dim=1, reduction="batchmean"),
    case("weighted", [(16, 12), (3, 5, 7, 4)], [(3, 5, 3, 4)], make=weighted, dim=1, reduction="rowmean"),
    case("first_dim", [(12, 40)], [(6, 5)], dim=0, reduction="sum"),
]


class TestConformance(ConformanceSuite):
    cases = CASES


def pair(*shape: int, spread: float = 3.0, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    made = logits(spread)(torch.Generator().manual_seed(3), shape)
    return made["student"].to(device), made["teacher"].to(device)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 5), (7,)])
@pytest.mark.filterwarnings("ignore:reduction")
def test_equals_torch_kl_div(target: Target, reduction: str, shape: tuple[int, ...]) -> None:
    s, t = pair(*shape, device=target.device)
    expected = F.kl_div(F.log_softmax(s / 4, -1), F.softmax(t / 4, -1), reduction=reduction) * 16
    torch.testing.assert_close(kd_kl_div(s, t, 4.0, reduction=reduction), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("num_classes", [10, 1000, 20_000])
def test_near_equal_logits_keep_their_digits(target: Target, num_classes: int, apart: float) -> None:
    """Where F.kl_div in fp32 is wrong by more than the value itself, loss and gradient stay right."""
    generator = torch.Generator().manual_seed(5)
    t = 3 * torch.randn(2, num_classes, generator=generator)
    s = (t + apart * torch.randn(2, num_classes, generator=generator)).to(target.device).requires_grad_()
    t = t.to(target.device)
    loss = kd_kl_div(s, t, 2.0, reduction="sum")
    (grad,) = torch.autograd.grad(loss, s)
    s64 = s.detach().double().cpu().requires_grad_()
    exact = oracle(s64, t.double().cpu(), 2.0, reduction="sum")
    (exact_grad,) = torch.autograd.grad(exact, s64)
    assert abs(loss.item() / exact.item() - 1) < (3e-3 if apart > 1e-4 else 5e-2)
    error = (grad.double().cpu() - exact_grad).norm() / exact_grad.norm()
    assert error < 1e-3


@pytest.mark.skipif(INTERPRETING, reason="the reference's two forms")
def test_the_closed_form_is_the_plain_form() -> None:
    """What eager CPU calls take equals what torch.compile, vmap and float64 take: careful rows among easy ones."""
    from kdfast.reference.kl.rows import kd_kl

    s, t = pair(6, 5, 4, spread=8.0)
    s[1], t[2, 3] = t[1] + 1e-4, -math.inf
    weight, mask = torch.rand(6, 4), torch.rand(6, 4) > 0.2
    leaves = [x.requires_grad_() for x in (s, t)]
    options = {"dim": 1, "row_weight": weight, "mask": mask}
    upstream = torch.rand(6, 4)
    got = kd_kl_div(s, t, 3.0, reduction="none", **options)
    want = kd_kl(s, t, 3.0, 1, weight, mask, 1.0, False)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    for g, w in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream)):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(INTERPRETING, reason="vmap does not look inside a launch")
def test_vmap_on_the_reference() -> None:
    s, t = pair(3, 4, 7)
    each = torch.func.vmap(lambda a, b: kd_kl_div(a, b, 2.0))(s, t)
    torch.testing.assert_close(each, torch.stack([kd_kl_div(a, b, 2.0) for a, b in zip(s, t)]))


def test_absent_classes_give_no_nan(target: Target) -> None:
    s, t = pair(4, 9, device=target.device)
    t[:, 2] = -math.inf  # masked in the teacher only
    s[:, 5] = t[:, 5] = -math.inf  # masked in both
    s, t = s.requires_grad_(), t.requires_grad_()
    loss = kd_kl_div(s, t, 2.0, reduction="sum")
    loss.backward()
    keep = [0, 1, 2, 3, 4, 6, 7, 8]
    s64, t64 = (x.detach().double().cpu()[:, keep].requires_grad_() for x in (s, t))
    rows = [i for i, k in enumerate(keep) if k != 2]
    log_q = F.log_softmax(s64 / 2, -1)[:, rows]
    log_p = F.log_softmax(t64[:, rows] / 2, -1)
    exact = 4 * (log_p.exp() * (log_p - log_q)).sum()
    exact.backward()
    assert_verbose_allclose(loss, exact, rtol=1e-5, atol=1e-6)
    assert_verbose_allclose(s.grad[:, keep], s64.grad, rtol=1e-5, atol=1e-6)
    assert_verbose_allclose(t.grad[:, keep], t64.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(s.grad[:, 5], torch.zeros_like(s.grad[:, 5]))


def test_a_class_absent_in_the_student_only_is_infinite_as_in_torch(target: Target) -> None:
    s, t = pair(2, 5, device=target.device)
    s[0, 1] = -math.inf
    rows = kd_kl_div(s, t, reduction="none")
    assert rows[0] == math.inf
    assert rows[1].isfinite()


def test_shift_invariance(target: Target) -> None:
    s, t = pair(5, 17, device=target.device)
    shift = torch.arange(5, device=target.device)[:, None] * 16.0
    torch.testing.assert_close(kd_kl_div(s + shift, t - shift), kd_kl_div(s, t), rtol=1e-4, atol=1e-6)


def test_huge_logits_do_not_overflow(target: Target) -> None:
    s, t = (x * 1e4 for x in pair(3, 11, device=target.device))
    assert_verbose_allclose(kd_kl_div(s, t), oracle(s.double().cpu(), t.double().cpu()), rtol=1e-5, atol=0.0)


def test_upstream_gradient_is_applied_and_backward_repeats(target: Target) -> None:
    """Two backwards of one graph agree, and the second does not alter what the first returned."""
    s, t = (x.requires_grad_() for x in pair(6, 33, device=target.device))
    hidden_s, hidden_t = s * 1, t * 1  # not leaves: autograd hands the buffers over as they are
    loss = kd_kl_div(hidden_s, hidden_t, 3.0, reduction="sum")
    first = torch.autograd.grad(loss, [hidden_s, hidden_t], retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(
        loss, [hidden_s, hidden_t], torch.tensor(5.0, device=s.device), retain_graph=True
    )
    third = torch.autograd.grad(loss, [hidden_s, hidden_t])
    for one, copy_, five, again in zip(first, kept, second, third, strict=True):
        assert torch.equal(one, copy_)
        torch.testing.assert_close(five, 5 * one, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(again, one, rtol=1e-6, atol=1e-8)


def test_half_precision_gradient_is_rounded_once(target: Target) -> None:
    """A loss scale of 3 must not round the bf16 gradient of 1 and then its triple."""
    if target.backend == "reference":
        pytest.skip("autograd's own rounding")
    s, t = (x.bfloat16() for x in pair(8, 40, device=target.device))
    leaf = s.clone().requires_grad_()
    (got,) = torch.autograd.grad(
        kd_kl_div(leaf, t, 2.0, reduction="sum"), leaf, torch.tensor(3.0, device=s.device)
    )
    s32 = s.float().requires_grad_()
    (full,) = torch.autograd.grad(kd_kl_div(s32, t.float(), 2.0, reduction="sum") * 3, s32)
    # One rounding: within one unit in the last place (the interpreter truncates).
    assert bool(((got.float() - full).abs() <= full.abs() * 2**-7 + 1e-12).all())


def test_backward_through_unreduced_rows(target: Target) -> None:
    s, t = (x.requires_grad_() for x in pair(5, 8, device=target.device))
    upstream = torch.linspace(-1, 2, 5, device=s.device)
    got = torch.autograd.grad(kd_kl_div(s, t, 2.0, reduction="none"), [s, t], upstream)
    s64, t64 = (x.detach().double().cpu().requires_grad_() for x in (s, t))
    want = torch.autograd.grad(oracle(s64, t64, 2.0, reduction="none"), [s64, t64], upstream.double().cpu())
    for g, w in zip(got, want, strict=True):
        assert_verbose_allclose(g, w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "rowmean", "none"])
def test_all_rows_masked_is_zero(target: Target, reduction: str) -> None:
    s, t = pair(3, 6, device=target.device)
    s[1] = math.nan  # a masked row may hold anything
    s, t = s.requires_grad_(), t.requires_grad_()
    loss = kd_kl_div(s, t, reduction=reduction, mask=torch.zeros(3, dtype=torch.bool, device=s.device))
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(s.grad, torch.zeros_like(s))
    assert torch.equal(t.grad, torch.zeros_like(t))


def test_temperature_as_a_tensor(target: Target) -> None:
    s, t = pair(4, 7, device=target.device)
    expected = kd_kl_div(s, t, 3.0)
    for tensor in (torch.tensor(3.0, device=s.device), torch.tensor([3.0]), torch.tensor(3)):
        assert torch.equal(kd_kl_div(s, t, tensor), expected)


def test_mixed_dtypes_give_each_its_own_gradient_dtype(target: Target) -> None:
    s, t = pair(4, 7, device=target.device)
    s, t = s.requires_grad_(), t.bfloat16().requires_grad_()
    loss = kd_kl_div(s, t)
    assert loss.dtype == torch.float32
    loss.backward()
    assert (s.grad.dtype, t.grad.dtype) == (torch.float32, torch.bfloat16)


def test_expanded_and_five_dimensional_inputs(target: Target) -> None:
    s, t = pair(1, 6, device=target.device)
    torch.testing.assert_close(
        kd_kl_div(s.expand(4, 6), t.expand(4, 6), reduction="sum"), 4 * kd_kl_div(s, t, reduction="sum")
    )
    s, t = pair(2, 3, 4, 2, 2, device=target.device)
    moved = s.permute(4, 1, 2, 0, 3).contiguous().permute(3, 1, 2, 4, 0)  # three groups of strides
    torch.testing.assert_close(kd_kl_div(moved, t, dim=1), kd_kl_div(s.contiguous(), t, dim=1))


@pytest.mark.parametrize("dim", [-1, 1])
def test_offsets_beyond_32_bits(target: Target, dim: int) -> None:
    """Rows, and classes, that lie 2³¹ elements apart: 32-bit index arithmetic would wrap into other memory."""
    near = logits(3.0)(torch.Generator().manual_seed(1), (3, 5) if dim == -1 else (1, 3, 8))
    strides = (2**30, 1) if dim == -1 else (1, 2**30, 1)  # each below 2³¹, and so an int32
    far = {}
    for key, value in near.items():
        # Uninitialised memory costs nothing until it is touched: a few pages of 8 GiB are.
        far[key] = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided(value.shape, strides)
        far[key].copy_(value)
    got = kd_kl_div(far["student"].requires_grad_(), far["teacher"], 2.0, dim=dim)
    (grad,) = torch.autograd.grad(got, far["student"])
    student = near["student"].bfloat16().requires_grad_()
    want = kd_kl_div(student, near["teacher"].bfloat16(), 2.0, dim=dim)
    assert torch.equal(got, want)
    assert torch.equal(grad, torch.autograd.grad(want, student)[0])


def test_autocast_keeps_half_inputs_and_a_float32_loss(target: Target) -> None:
    layer = torch.nn.Linear(6, 9, device=target.device)
    x = torch.randn(4, 6, device=target.device)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        s = layer(x)
        loss = kd_kl_div(s, torch.randn(4, 9, device=target.device), 4.0)
    assert (s.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    loss.backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
def test_gradcheck_and_double_backward_in_float64() -> None:
    s, t = (x.double().requires_grad_() for x in pair(3, 5))
    weight = torch.rand(3, dtype=torch.float64)
    mask = torch.tensor([True, False, True])

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return kd_kl_div(a, b, 2.0, row_weight=weight, mask=mask, reduction="rowmean")

    assert torch.autograd.gradcheck(loss, (s, t))
    assert torch.autograd.gradgradcheck(loss, (s, t))


def test_double_backward_is_correct_on_every_backend(target: Target) -> None:
    """A gradient penalty: silently dropping the second derivative would be the worst of bugs."""
    s, t = (x.requires_grad_() for x in pair(3, 5, device=target.device))

    def penalty(a: torch.Tensor, b: torch.Tensor, loss: Any) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(loss(a, b), [a, b], create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), [a, b])

    got = penalty(s, t, lambda a, b: kd_kl_div(a, b, 2.0, reduction="sum") * 3)
    s64, t64 = (x.detach().double().cpu().requires_grad_() for x in (s, t))
    want = penalty(s64, t64, lambda a, b: oracle(a, b, 2.0, reduction="sum") * 3)
    for g, w in zip(got, want, strict=True):
        assert_verbose_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_compiles_into_one_graph(target: Target, reduction: str) -> None:
    s, t = (x.requires_grad_() for x in pair(4, 9, device=target.device))

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return kd_kl_div(a * 1.5, b, 2.0, reduction=reduction).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(s, t), [s, t])
    want = torch.autograd.grad(loss(s, t), [s, t])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    num_classes=st.integers(1, 40),
    temperature=st.floats(0.25, 20),
    spread=st.floats(1e-3, 30),
    seed=st.integers(0, 2**16),
)
@pytest.mark.skipif(INTERPRETING, reason="the reference; the kernel runs the conformance suite")
def test_never_negative_and_equal_to_the_definition(
    rows: int, num_classes: int, temperature: float, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, t = (spread * torch.randn(rows, num_classes, generator=generator) for _ in range(2))
    got = kd_kl_div(s, t, temperature, reduction="none")
    assert bool((got >= -1e-6 * spread).all())
    assert_verbose_allclose(
        got,
        oracle(s.double(), t.double(), temperature, reduction="none"),
        rtol=2e-4,
        atol=1e-6 * temperature**2,
    )


def test_the_module_is_the_function(target: Target) -> None:
    s, t = pair(4, 7, device=target.device)
    module = copy.deepcopy(KDLoss(3.0, reduction="sum"))
    assert torch.equal(module(s, t), kd_kl_div(s, t, 3.0, reduction="sum"))
    assert "temperature=3.0" in repr(module)


# --- refusals ------------------------------------------------------------------------------------------------
S = torch.zeros(4, 5)


@pytest.mark.parametrize(
    "error, match, args, options",
    [
        (ValueError, "teacher: got shape", (S, torch.zeros(4, 6)), {}),
        (TypeError, "student: got dtype", (S.int(), S), {}),
        (TypeError, "teacher: got dtype", (S, S.long()), {}),
        (TypeError, "student: got list", ([0.0], S), {}),
        (ValueError, "0-d", (torch.tensor(1.0), torch.tensor(1.0)), {}),
        (ValueError, "temperature: got 0", (S, S, 0.0), {}),
        (ValueError, "temperature: got -1", (S, S, -1.0), {}),
        (ValueError, "temperature: got nan", (S, S, math.nan), {}),
        (ValueError, "temperature: got inf", (S, S, math.inf), {}),
        (ValueError, "temperature: got nan", (S, S, torch.tensor(math.nan)), {}),
        (ValueError, "temperature: got shape", (S, S, torch.ones(2)), {}),
        (ValueError, "temperature: requires grad", (S, S, torch.tensor(1.0, requires_grad=True)), {}),
        (TypeError, "temperature: got str", (S, S, "hot"), {}),
        (ValueError, "reduction: got 'avg'", (S, S), {"reduction": "avg"}),
        (ValueError, "dim: got 2", (S, S), {"dim": 2}),
        (ValueError, "dim: got -3", (S, S), {"dim": -3}),
        (TypeError, "dim: got float", (S, S), {"dim": 1.0}),
        (ValueError, "mask: got shape", (S, S), {"mask": torch.ones(5, dtype=torch.bool)}),
        (TypeError, "mask: got dtype", (S, S), {"mask": torch.ones(4)}),
        (ValueError, "row_weight: got shape", (S, S), {"row_weight": torch.ones(4, 5)}),
        (TypeError, "row_weight: got dtype", (S, S), {"row_weight": torch.ones(4, dtype=torch.int64)}),
        (TypeError, "row_weight: got list", (S, S), {"row_weight": [1.0] * 4}),
        (ValueError, "row_weight: requires grad", (S, S), {"row_weight": torch.ones(4, requires_grad=True)}),
        (ValueError, "teacher: is on meta", (S, S.to("meta")), {}),
        (ValueError, "mask: is on meta", (S, S), {"mask": torch.ones(4, dtype=torch.bool, device="meta")}),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, args: Any, options: Any) -> None:
    with pytest.raises(error, match=match):
        kd_kl_div(*args, **options)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter does take CPU tensors")
def test_triton_on_a_cpu_tensor_is_refused() -> None:
    kdfast.set_backend("triton")
    with pytest.raises(kdfast.BackendError, match="TRITON_INTERPRET=1"):
        kd_kl_div(S, S)


def test_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(kdfast.ConfigError, match="accepted: auto, triton, reference"):
        kdfast.set_backend("cuda")  # type: ignore[arg-type]
    monkeypatch.setenv("KDFAST_BACKEND", "fast")
    with pytest.raises(kdfast.ConfigError, match="KDFAST_BACKEND"):
        kdfast.get_backend()
