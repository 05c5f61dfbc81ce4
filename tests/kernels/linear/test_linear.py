"""fused_linear_kd_loss: equal to the loss of the logits, and without them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdfast.functional import fused_linear_kd_loss
from kdfast.kernels.linear import default_chunk_rows
from kdfast.nn import FusedLinearKDLoss
from kdfast.ops.linear import fused_linear_kd_op
from kdfast.ops.linear.chunks import compute
from kdfast.ops.linear.job import Job, flat
from kdfast.reference.linear import linear_kd
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose, reduced

ROLES = ("student", "teacher")
KEYS = (
    "student_hidden",
    "student_weight",
    "teacher_hidden",
    "teacher_weight",
    "student_bias",
    "teacher_bias",
)


def oracle(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    temperature: float,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    reduction: str = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """All logits at once, and the definition."""
    s = F.linear(student_hidden, student_weight, student_bias) / temperature
    t = F.linear(teacher_hidden, teacher_weight, teacher_bias) / temperature
    rows = F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none").sum(-1) * temperature**2
    return reduced(rows, reduction, s.shape, row_weight, mask)


def heads(bias: bool = True, rowwise: bool = False) -> Any:
    def make(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        *rows, num_classes = shape

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator)

        made = {
            "student_hidden": draw(*rows, 6),
            "student_weight": draw(num_classes, 6),
            "teacher_hidden": draw(*rows, 9),
            "teacher_weight": draw(num_classes, 9),
        }
        if bias:
            made |= {"student_bias": draw(num_classes), "teacher_bias": draw(num_classes)}
        if rowwise:
            made["row_weight"] = torch.rand(rows, generator=generator)
            made["mask"] = torch.rand(rows, generator=generator) > 0.4
        return made

    return make


def job_of(inputs: dict[str, torch.Tensor], student: tuple[str, ...] = ()) -> Job:
    """What the op takes: its rows flat, T = 2, a divisor of 3; ``student`` names what requires grad."""
    given = {key: x.flatten(0, -2) if "hidden" in key else x for key, x in inputs.items() if key in KEYS}
    for key in student:
        given[key] = given[key].detach().requires_grad_()
    own = {key.removeprefix("student_"): x for key, x in given.items()}
    empty: dict[str, Any] = dict.fromkeys(Job._fields)
    numbers = {"kind": "forward_kl", "kd_weight": 1.0, "temperature": 2.0, "ratio": 1.0, "divisor": 3.0}
    zeros = dict.fromkeys(("smoothing", "softcap", "teacher_softcap"), 0.0)
    return Job(**(empty | {"bucket": True, "numbers": (0.0, 0.0)} | numbers | zeros | own))


def case(
    name: str,
    shapes: list[tuple[int, ...]],
    small: list[tuple[int, ...]],
    *,
    bias: bool = True,
    rowwise: bool = False,
    **options: Any,
) -> OpCase:
    options = {"temperature": 2.0, "chunk_rows": 4, **options}
    student = ("student_hidden", "student_weight", *(("student_bias",) if bias else ()))

    def checked(inputs: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...]]:
        return fused_linear_kd_op.overload, (*flat(job_of(inputs, student)), 4, True, True, bias)

    return OpCase(
        name=name,
        make=heads(bias, rowwise),
        run=lambda **kw: fused_linear_kd_loss(**kw, **options),
        oracle=lambda **kw: oracle(**kw, **options),
        shapes=shapes,
        small_shapes=small,
        differentiable=student,
        cast=KEYS if bias else KEYS[:4],
        tolerances={torch.float32: (5e-5, 1e-5), torch.bfloat16: (2e-2, 1e-2), torch.float16: (3e-3, 2e-3)},
        opcheck=checked,
        empty_shape=(0, shapes[0][-1]) if options.get("reduction") == "sum" else None,
    )


# 16 classes: the gradient goes over the logits; 19: beside them. 10 rows in chunks of 4: the last is short.
CASES = [
    case("in_place", [(10, 16), (2, 5, 40)], [(6, 16)], reduction="sum"),
    case("odd", [(10, 19)], [(6, 19)]),
    case("no_bias", [(7, 24)], [(5, 8)], bias=False, reduction="mean"),
    case("weighted", [(3, 5, 24)], [(2, 3, 8)], rowwise=True, reduction="rowmean"),
    case("one_chunk", [(10, 16)], [(3, 16)], chunk_rows=None),
]


class TestConformance(ConformanceSuite):
    cases = CASES


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [
            x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.device.type != "meta"
        ]
        self.elements = max([self.elements, *sizes])
        return out


def draw(*shape: int, device: str = "cpu", **options: Any) -> dict[str, torch.Tensor]:
    made = heads(**options)(torch.Generator().manual_seed(3), shape)
    return {key: value.to(device) for key, value in made.items()}


@pytest.mark.skipif(INTERPRETING, reason="the interpreter copies every tensor, as bytes")
def test_all_logits_never_exist(target: Target) -> None:
    """No tensor grows with rows × classes; and the instrument does see one where a chunk is everything."""
    inputs = draw(64, 96, device=target.device)
    seen = {}
    for chunk_rows in (8, 64):
        with Largest() as largest:
            results = compute(job_of(inputs), chunk_rows, (True, True, True))
        seen[chunk_rows] = largest.elements
    assert seen == {8: max(8 * 96, 96 * 9, 64 * 9), 64: 64 * 96}
    assert [x.numel() for x in results] == [1, 64 * 6, 96 * 6, 96]


def test_chunks_do_not_change_the_loss(target: Target) -> None:
    inputs = draw(10, 16, device=target.device)
    losses = [fused_linear_kd_loss(**inputs, chunk_rows=n) for n in (1, 3, 10, 100)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-7)


def test_only_what_is_needed_gets_a_gradient(target: Target) -> None:
    inputs = draw(6, 16, device=target.device)
    inputs["student_weight"].requires_grad_()
    fused_linear_kd_loss(**inputs, chunk_rows=4).backward()
    assert inputs["student_weight"].grad is not None
    assert inputs["student_hidden"].grad is None
    with torch.no_grad():
        assert not fused_linear_kd_loss(**inputs).requires_grad


def test_upstream_gradient_and_a_second_backward(target: Target) -> None:
    inputs = draw(6, 16, device=target.device)
    hidden = inputs["student_hidden"].requires_grad_()
    loss = fused_linear_kd_loss(**inputs, chunk_rows=4)
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    kept = once.clone()
    (thrice,) = torch.autograd.grad(loss * 3, hidden)
    assert torch.equal(once, kept)
    torch.testing.assert_close(thrice, 3 * once)


def test_second_derivatives_are_refused(target: Target) -> None:
    inputs = draw(4, 8, device=target.device)
    hidden = inputs["student_hidden"].requires_grad_()
    with pytest.raises(NotImplementedError, match="kd_kl_div"):
        torch.autograd.grad(fused_linear_kd_loss(**inputs), hidden, create_graph=True)


def test_masked_rows_may_hold_anything(target: Target) -> None:
    inputs = draw(5, 16, device=target.device)
    hidden = inputs["student_hidden"]
    hidden[2] = float("nan")
    mask = torch.tensor([True, True, False, True, True], device=hidden.device)
    hidden.requires_grad_()
    loss = fused_linear_kd_loss(**inputs, mask=mask, chunk_rows=2, reduction="rowmean")
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite()
    assert torch.equal(grad[2], torch.zeros_like(grad[2]))


def test_autocast_takes_float32_weights(target: Target) -> None:
    inputs = draw(5, 16, device=target.device)
    inputs["student_weight"].requires_grad_()
    inputs["student_hidden"] = inputs["student_hidden"].bfloat16()
    with torch.autocast(target.device, dtype=torch.bfloat16):
        loss = fused_linear_kd_loss(**inputs, chunk_rows=2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert inputs["student_weight"].grad.dtype == torch.float32
    exact = oracle(**{key: value.detach().double().cpu() for key, value in inputs.items()}, temperature=1.0)
    assert_verbose_allclose(loss, exact, rtol=2e-2, atol=0.0)


@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
def test_gradcheck_in_float64() -> None:
    inputs = {key: value.double() for key, value in draw(4, 6).items()}
    student = [
        inputs.pop(key).requires_grad_() for key in ("student_hidden", "student_weight", "student_bias")
    ]

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fused_linear_kd_loss(
            hidden, weight, student_bias=bias, temperature=2.0, chunk_rows=3, **inputs
        )

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "jeffreys", "ab"])
def test_compiles_into_one_graph(target: Target, kind: Any) -> None:
    """Every kind: those without a closed form are differentiated inside of the op on a CPU."""
    inputs = draw(6, 16, device=target.device)
    hidden = inputs.pop("student_hidden").requires_grad_()
    torch.compiler.reset()
    call = lambda x: fused_linear_kd_loss(x * 2, **inputs, kind=kind, chunk_rows=4)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(hidden), hidden)[0] for f in (compiled, call))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("chunk_rows", [1, 4, 6])
def test_the_op_is_the_definition_in_any_chunks(target: Target, chunk_rows: int) -> None:
    """The reference takes all logits at once; the op sees a chunk, and writes gradients itself."""
    inputs = {key: value.double() for key, value in draw(6, 16).items()}
    row_weight, mask = torch.linspace(0.5, 2.0, 6), torch.arange(6) != 2
    leaves = [inputs[f"student_{part}"].requires_grad_() for part in ("hidden", "weight", "bias")]
    heads = [tuple(inputs.get(f"{who}_{part}") for part in ("hidden", "weight", "bias")) for who in ROLES]
    want = linear_kd(*heads, 2.0, row_weight, mask, 6.0)
    rows = {"row_weight": row_weight.to(target.device), "mask": mask.to(target.device)}
    moved = {key: value.detach().float().to(target.device) for key, value in inputs.items()}
    own = [moved[f"student_{part}"].requires_grad_() for part in ("hidden", "weight", "bias")]
    got = fused_linear_kd_loss(**moved, **rows, temperature=2.0, chunk_rows=chunk_rows)
    assert_verbose_allclose(got, want, rtol=1e-4, atol=1e-5)
    grads = zip(torch.autograd.grad(got, own), torch.autograd.grad(want, leaves), strict=True)
    for mine, exact in grads:
        assert_verbose_allclose(mine, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(INTERPRETING, reason="no kernel takes part")
def test_the_definition_is_the_textbook_sum() -> None:
    inputs = {key: value.double() for key, value in draw(6, 16).items()}
    heads = [tuple(inputs.get(f"{who}_{part}") for part in ("hidden", "weight", "bias")) for who in ROLES]
    want = oracle(**inputs, temperature=2.0, reduction="sum")
    assert_verbose_allclose(linear_kd(*heads, 2.0, None, None, 1.0), want, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(INTERPRETING, reason="the other process has Triton loaded")
def test_the_plan_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; from kdfast.kernels.linear.plan import default_chunk_rows as d"
    subprocess.run([sys.executable, "-c", f"{code}; assert d(10**9) == 128"], check=True)


@pytest.mark.parametrize("itemsize, chunks", [(4, 1), (4, 2), (4, 3), (8, 2)])
def test_default_chunks_fit_the_budget(itemsize: int, chunks: int) -> None:
    rows = default_chunk_rows(128_256, itemsize=itemsize, chunks=chunks)
    assert 0 < rows * 128_256 * itemsize * chunks <= 512 * 2**20
    assert (rows + 128) * 128_256 * itemsize * chunks > 512 * 2**20
    assert rows % 128 == 0
    assert default_chunk_rows(10**9, itemsize=itemsize, chunks=chunks) == 128


H, W, G, U = torch.zeros(4, 6), torch.zeros(8, 6), torch.zeros(4, 9), torch.zeros(8, 9)


@pytest.mark.parametrize(
    "error, match, args, options",
    [
        (TypeError, "student_hidden: got list", ([0.0], W, G, U), {}),
        (TypeError, "student_weight: got dtype", (H, W.int(), G, U), {}),
        (TypeError, "student_weight: got dtype torch.bfloat16", (H, W.bfloat16(), G, U), {}),
        (ValueError, "student_weight: got shape", (H, W.t(), G, U), {}),
        (ValueError, "student_hidden: got shape", (H[0], W, G, U), {}),
        (ValueError, "teacher_hidden: got shape", (H, W, G[:3], U), {}),
        (ValueError, "teacher_weight: got 7 classes", (H, W, G, U[:7]), {}),
        (ValueError, "student_bias: got shape", (H, W, G, U), {"student_bias": torch.zeros(7)}),
        (ValueError, "teacher_weight: requires grad", (H, W, G, U.clone().requires_grad_()), {}),
        (ValueError, "teacher_hidden: is on meta", (H, W, G.to("meta"), U), {}),
        (ValueError, "chunk_rows: got 0", (H, W, G, U), {"chunk_rows": 0}),
        (TypeError, "chunk_rows: got float", (H, W, G, U), {"chunk_rows": 2.0}),
        (ValueError, "reduction: got 'none'", (H, W, G, U), {"reduction": "none"}),
        (ValueError, "temperature: got 0", (H, W, G, U), {"temperature": 0.0}),
        (ValueError, "mask: got shape", (H, W, G, U), {"mask": torch.ones(8, dtype=torch.bool)}),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, args: Any, options: Any) -> None:
    with pytest.raises(error, match=match):
        fused_linear_kd_loss(*args, **options)


def test_the_module_takes_the_heads(target: Target) -> None:
    student, teacher = (
        torch.nn.Linear(6, 16).to(target.device),
        torch.nn.Linear(9, 16, bias=False).to(target.device),
    )
    inputs = draw(5, 16, device=target.device)
    hidden, teacher_hidden = inputs["student_hidden"], inputs["teacher_hidden"]
    loss = FusedLinearKDLoss(2.0, chunk_rows=2)(hidden, student, teacher_hidden, teacher)
    loss.backward()
    want = fused_linear_kd_loss(
        hidden,
        student.weight,
        teacher_hidden,
        teacher.weight.detach(),
        student_bias=student.bias,
        temperature=2.0,
    )
    torch.testing.assert_close(loss, want)
    assert student.bias.grad is not None
    assert teacher.weight.grad is None
    assert "chunk_rows=2" in repr(FusedLinearKDLoss(2.0, chunk_rows=2))
