"""topk_kd_loss: conformance, equality with the full KL, tails, padding, refusals."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdfast.functional import kd_kl_div, topk_kd_loss
from kdfast.nn import TopKKDLoss
from kdfast.ops import topk as ops
from kdfast.ops.common.row_loss import Row, flatten
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose, reduced

K = 4
WIDE = (torch.float32, torch.float64)
DTYPES = (*WIDE, torch.bfloat16, torch.float16)


def oracle(
    student: torch.Tensor,
    indices: torch.Tensor,
    logits: torch.Tensor,
    temperature: float,
    tail: str = "bucket",
    log_normalizer: torch.Tensor | None = None,
    reduction: str = "batchmean",
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Both distributions written out over their outcomes, and the definition of KL."""
    if tail == "renormalize":
        p = F.softmax(logits / temperature, -1)
        q = F.softmax(student.gather(-1, indices) / temperature, -1)
    else:
        q = F.softmax(student / temperature, -1).gather(-1, indices)
        p = (
            F.softmax(logits / temperature, -1)
            if log_normalizer is None
            else (logits / temperature - log_normalizer[..., None]).exp()
        )
        p, q = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp(min=1e-300)], -1) for x in (p, q))
    rows = (torch.special.xlogy(p, p) - p * q.log()).sum(-1) * temperature**2
    return reduced(rows, reduction, student.shape, row_weight, mask)


def cached(normalizer: bool = True, rowwise: bool = False) -> Any:
    def make(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        teacher = 2 * torch.randn(shape, generator=generator)
        kept = teacher.topk(min(K, shape[-1] - 1), -1)
        made = {
            "student": 2 * torch.randn(shape, generator=generator),
            "indices": kept.indices,
            "logits": kept.values,
        }
        if normalizer:
            made["log_normalizer"] = torch.logsumexp(teacher.double() / 2.5, -1).float()
        if rowwise:
            made["row_weight"] = torch.rand(shape[:-1], generator=generator)
            made["mask"] = torch.rand(shape[:-1], generator=generator) > 0.4
        return made

    return make


def case(
    name: str, shapes: list[tuple[int, ...]], small: list[tuple[int, ...]], make: Any, **options: Any
) -> OpCase:
    dtypes = options.pop("dtypes", DTYPES)
    options = {"temperature": 2.5, **options}

    def checked(inputs: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...]]:
        student = inputs["student"].requires_grad_()
        bucket = options.get("tail", "bucket") == "bucket"
        reduce = options.get("reduction") != "none"
        normalizer = inputs.get("log_normalizer")
        dim = student.dim() - 1
        labels = (inputs["indices"], normalizer)
        row = Row((float(bucket),), dim, 2.5, None, None, 2.0, reduce, *labels)
        return ops.topk.op, (student, inputs["logits"], *flatten(row))

    return OpCase(
        name=name,
        make=make,
        run=lambda **kw: topk_kd_loss(**kw, **options),
        oracle=lambda **kw: oracle(**kw, **options),
        shapes=shapes,
        small_shapes=small,
        differentiable=("student",),
        cast=("student",),
        dtypes=dtypes,
        launches=1,
        tolerances={torch.float32: (1e-4, 1e-5)},
        opcheck=checked,
        empty_shape=(0, *shapes[0][1:]) if options.get("reduction") == "sum" else None,
    )


# 5000 and 20000 classes are more than one block; 19 breaks 16-byte loads.
CASES = [
    case("bucket", [(17, 10), (5, 19), (8, 1000)], [(3, 10), (2, 19)], cached(), reduction="sum"),
    case("bucket_long", [(2, 5000), (2, 20_000)], [(2, 4200), (1, 16_500)], cached(), dtypes=WIDE),
    case("no_normalizer", [(9, 33), (2, 3, 21)], [(2, 3, 11)], cached(False), reduction="none"),
    case("renormalize", [(9, 33), (3, 5000)], [(3, 11)], cached(False), tail="renormalize"),
    case("weighted", [(16, 12)], [(5, 12)], cached(rowwise=True), reduction="rowmean"),
]


class TestConformance(ConformanceSuite):
    cases = CASES


def keep(teacher: torch.Tensor, k: int, temperature: float) -> dict[str, torch.Tensor]:
    kept = teacher.topk(k, -1)
    return {
        "indices": kept.indices,
        "logits": kept.values,
        "log_normalizer": torch.logsumexp(teacher / temperature, -1),
    }


def draw(*shape: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (2 * torch.randn(shape, generator=generator)).to(device), (
        2 * torch.randn(shape, generator=generator)
    ).to(device)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("normalizer", [True, False])
def test_all_classes_kept_is_the_full_kl(target: Target, tail: str, normalizer: bool) -> None:
    s, t = draw(5, 9, device=target.device)
    s.requires_grad_()
    cache = keep(t, 9, 2.0)
    if not normalizer or tail == "renormalize":
        del cache["log_normalizer"]
    got = topk_kd_loss(s, **cache, temperature=2.0, tail=tail)
    want = kd_kl_div(s, t, 2.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(x, s)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=2e-6)


def test_merging_outcomes_never_adds_divergence(target: Target) -> None:
    """The data-processing inequality: fewer outcomes, less KL; more of them, more of it."""
    s, t = draw(6, 30, device=target.device)
    rows = [topk_kd_loss(s, **keep(t, k, 2.0), temperature=2.0, reduction="none") for k in (1, 5, 20, 30)]
    for few, many in pairwise(rows):
        assert bool((few <= many + 1e-5).all())
    assert bool((rows[0] > 0).all())


def test_padding_counts_for_nothing(target: Target) -> None:
    s, t = draw(4, 12, device=target.device)
    s.requires_grad_()
    cache = keep(t, 3, 1.0)
    padded = dict(cache)
    padded["indices"] = torch.cat([cache["indices"], torch.full_like(cache["indices"][:, :2], -1)], -1)
    padded["logits"] = torch.cat([cache["logits"], torch.full_like(cache["logits"][:, :2], math.nan)], -1)
    for options in ({}, {"tail": "renormalize"}):
        if options:
            del cache["log_normalizer"], padded["log_normalizer"]
        want, got = (topk_kd_loss(s, **c, **options) for c in (cache, padded))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (got, want)))


def test_near_equal_logits_keep_their_digits(target: Target) -> None:
    s, t = draw(3, 40, device=target.device)
    s = (t + 1e-3 * s).requires_grad_()
    got = topk_kd_loss(s, **keep(t, 5, 1.0), reduction="sum")
    s64 = s.detach().double().cpu()
    want = oracle(
        s64,
        **{k: v.double() if v.is_floating_point() else v for k, v in keep(t.cpu(), 5, 1.0).items()},
        temperature=1.0,
        reduction="sum",
    )
    assert abs(got.item() / want.item() - 1) < 0.05


def test_masked_rows_may_hold_anything(target: Target) -> None:
    s, t = draw(3, 8, device=target.device)
    cache = keep(t, 3, 1.0)
    s[1] = math.nan
    cache["logits"][1] = math.nan
    s.requires_grad_()
    mask = torch.tensor([True, False, True], device=s.device)
    loss = topk_kd_loss(s, **cache, mask=mask, reduction="rowmean")
    (grad,) = torch.autograd.grad(loss, s)
    assert loss.isfinite()
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    assert bool((grad[0] != 0).all())


def test_backward_repeats_and_double_backward(target: Target) -> None:
    s, t = draw(3, 8, device=target.device)
    s.requires_grad_()
    cache = keep(t, 3, 1.0)
    hidden = s * 1
    value = topk_kd_loss(hidden, **cache)
    first = torch.autograd.grad(value, hidden, retain_graph=True)[0]
    copy = first.clone()
    triple = torch.autograd.grad(value, hidden, torch.tensor(3.0, device=s.device), retain_graph=True)[0]
    torch.testing.assert_close(triple, 3 * first, rtol=1e-4, atol=1e-6)
    assert torch.equal(first, copy)

    def penalty(x: torch.Tensor, of: Any, kept: dict[str, torch.Tensor]) -> torch.Tensor:
        (g,) = torch.autograd.grad(of(x, **kept, temperature=1.0), x, create_graph=True)
        return torch.autograd.grad((g * g).sum(), x)[0]

    s64 = s.detach().double().cpu().requires_grad_()
    exact = {k: v.double() if v.is_floating_point() else v for k, v in keep(t.cpu(), 3, 1.0).items()}
    assert_verbose_allclose(
        penalty(s, topk_kd_loss, cache), penalty(s64, oracle, exact), rtol=1e-3, atol=1e-5
    )


@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_gradcheck_in_float64(tail: str) -> None:
    s, t = (x.double() for x in draw(3, 7))
    cache = keep(t, 3, 1.0)
    if tail == "renormalize":
        del cache["log_normalizer"]
    assert torch.autograd.gradcheck(lambda x: topk_kd_loss(x, **cache, tail=tail), (s.requires_grad_(),))


S, AT, L = torch.zeros(4, 5), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)


@pytest.mark.parametrize(
    "error, match, args, options",
    [
        (ValueError, "tail: got 'drop'", (S, AT, L), {"tail": "drop"}),
        (ValueError, "reduction: got 'avg'", (S, AT, L), {"reduction": "avg"}),
        (TypeError, "indices: got list", (S, [0], L), {}),
        (TypeError, "indices: got dtype", (S, AT.int(), L), {}),
        (ValueError, "indices: got shape", (S, AT[:3], L[:3]), {}),
        (ValueError, "logits: got shape", (S, AT, L[:, :1]), {}),
        (TypeError, "logits: got dtype", (S, AT, AT), {}),
        (TypeError, "student: got dtype", (S.int(), AT, L), {}),
        (ValueError, "indices: got class 5", (S, AT + 5, L), {}),
        (ValueError, "indices: got k = 0", (S, AT[:, :0], L[:, :0]), {}),
        (ValueError, "indices: is on meta", (S, AT.to("meta"), L), {}),
        (ValueError, "logits: requires grad", (S, AT, L.clone().requires_grad_()), {}),
        (
            ValueError,
            "log_normalizer: got a tensor",
            (S, AT, L),
            {"tail": "renormalize", "log_normalizer": S[:, 0]},
        ),
        (ValueError, "log_normalizer: got shape", (S, AT, L), {"log_normalizer": S}),
        (ValueError, "temperature: got -1", (S, AT, L), {"temperature": -1.0}),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, args: Any, options: Any) -> None:
    with pytest.raises(error, match=match):
        topk_kd_loss(*args, **options)


def test_the_module_is_the_function(target: Target) -> None:
    s, t = draw(4, 7, device=target.device)
    cache = keep(t, 3, 2.0)
    assert torch.equal(TopKKDLoss(2.0)(s, **cache), topk_kd_loss(s, **cache, temperature=2.0))
    assert "tail='bucket'" in repr(TopKKDLoss())
