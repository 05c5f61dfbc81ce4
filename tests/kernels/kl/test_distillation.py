"""distillation_loss and kd_statistics: what rides on the KL pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdfast.functional import distillation_loss, kd_kl_div, kd_statistics
from kdfast.nn import DistillationLoss
from tests.conftest import Target
from tests.kernels.kl.test_kl import oracle as kl_oracle
from tests.kernels.kl.test_kl import pair
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose

IGNORED = -100


def cross_entropy(
    student: torch.Tensor,
    target: torch.Tensor,
    share: torch.Tensor | float,
    smoothing: float,
    dim: int,
    reduction: str,
    weight: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """torch's own, one value a row first, so that shares, weights and masks can be applied."""
    rows = F.cross_entropy(
        student.movedim(dim, 1), target, reduction="none", label_smoothing=smoothing, ignore_index=IGNORED
    )
    rows = rows * share * (1 if weight is None else weight)
    counts = target != IGNORED
    if mask is not None:
        rows = torch.where(mask, rows, torch.zeros_like(rows))
        counts = counts & mask if reduction == "rowmean" else counts
    if reduction == "none":
        return rows
    return rows.sum() / (1 if reduction == "sum" else max(1, int(counts.sum())))


def oracle(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    mixed_target: torch.Tensor | None = None,
    lam: Any = None,
    row_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    temperature: float,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    dim: int = -1,
    reduction: str = "batchmean",
) -> torch.Tensor:
    kd = kl_oracle(student, teacher, temperature, dim, reduction, row_weight, mask)
    if student.dim() == 2 or dim == 1:
        dim = 1
    options = (label_smoothing, dim, reduction, row_weight, mask)
    ce = cross_entropy(student, target, 1.0 if lam is None else lam, *options)
    if mixed_target is not None:
        ce = ce + cross_entropy(student, mixed_target, 1 - lam, *options)
    return kd_weight * kd + ce_weight * ce


def labelled(*names: str, dim: int = 1, ignored: bool = True) -> Any:
    def make(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        rows = shape[:dim] + shape[dim + 1 :]
        made = {key: 3 * torch.randn(shape, generator=generator) for key in ("student", "teacher")}
        for key in ("target", "mixed_target"):
            if key in ("target", *names):
                made[key] = torch.randint(shape[dim], rows, generator=generator)
                if ignored:
                    made[key][torch.rand(rows, generator=generator) < 0.25] = IGNORED
        for key in ("row_weight", "lam"):
            if key in names:
                made[key] = torch.rand(rows, generator=generator)
        if "mask" in names:
            made["mask"] = torch.rand(rows, generator=generator) > 0.3
        return made

    return make


def case(name: str, make: Any, shapes: Any, small: Any, **options: Any) -> OpCase:
    options = {"temperature": 2.5, "kd_weight": 0.7, "ce_weight": 0.4, **options}
    lam = options.pop("lam", None)

    def checked(inputs: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...]]:
        from kdfast.ops.common.row_loss import Row, flatten
        from kdfast.ops.kl import distillation

        leaves = [inputs[key].requires_grad_() for key in ("student", "teacher")]
        target = inputs["target"].clamp(min=0)
        factor = torch.rand(target.shape, device=target.device)
        labels = (target, factor, inputs.get("mixed_target", target).clamp(min=0), factor)
        dim = options.get("dim", -1) % leaves[0].dim()
        row = Row((0.1,), dim, 2.5, None, None, 2.0, False, *labels)
        return distillation.op, (*leaves, *flatten(row))

    extra = {} if lam is None else {"lam": lam}
    return OpCase(
        name=name,
        make=make,
        run=lambda **kw: distillation_loss(**kw, **options, **extra),
        oracle=lambda **kw: oracle(**kw, **options, **extra),
        shapes=shapes,
        small_shapes=small,
        differentiable=("student", "teacher"),
        cast=("student", "teacher"),
        launches=1,
        tolerances={torch.float32: (2e-5, 1e-5)},
        opcheck=checked,
    )


CASES = [
    # 10: CIFAR; 19: not a multiple of 16 bytes; 2000: one row a program; 20,000: read twice.
    case("plain", labelled(), [(9, 10), (5, 19), (3, 2000), (2, 20_000)], [(5, 10), (2, 2000)]),
    case("smooth", labelled(), [(7, 33)], [(3, 11)], label_smoothing=0.1, reduction="mean"),
    case("mixup", labelled("mixed_target"), [(8, 21)], [(4, 7)], lam=0.3, label_smoothing=0.1),
    case("cutmix", labelled("mixed_target", "lam"), [(8, 21), (1, 20_000)], [(4, 7), (1, 20_000)]),
    case("pixels", labelled(), [(2, 19, 7, 5), (1, 150, 4, 3)], [(2, 7, 3, 2)], dim=1),
    case(
        "weighted",
        labelled("row_weight", "mask", "mixed_target", "lam"),
        [(3, 6, 5, 4)],
        [(2, 3, 3, 2)],
        dim=1,
        reduction="rowmean",
        label_smoothing=0.2,
    ),
    case("per_row", labelled("row_weight", "mask"), [(9, 50)], [(4, 9)], reduction="none"),
    case("labels_alone", labelled(), [(9, 50)], [(4, 9)], kd_weight=0.0, ce_weight=1.0, reduction="sum"),
]


class TestConformance(ConformanceSuite):
    cases = CASES


def statistics_oracle(
    student: torch.Tensor, teacher: torch.Tensor, dim: int = -1
) -> tuple[torch.Tensor, ...]:
    probability, _ = torch.softmax(teacher, dim).max(dim)
    chosen = teacher.argmax(dim)
    kl = kl_oracle(student, teacher, 4.0, dim, "none") / 16
    return kl, chosen.double(), probability, (student.argmax(dim) == chosen).double()


def statistics_case(name: str, shapes: Any, small: Any, **options: Any) -> OpCase:
    def checked(inputs: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...]]:
        from kdfast.ops.kl import kd_statistics_op

        dim = options.get("dim", -1) % inputs["student"].dim()
        return kd_statistics_op.overload, (inputs["student"], inputs["teacher"], 4.0, None, dim)

    def make(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        # Whole numbers: equal logits are many, and the first of them is the class.
        values = {key: torch.randint(-3, 4, shape, generator=generator) for key in ("student", "teacher")}
        return {key: value.float() for key, value in values.items()}

    return OpCase(
        name=name,
        make=make,
        run=lambda **kw: tuple(kd_statistics(**kw, temperature=4.0, **options)),
        oracle=lambda **kw: statistics_oracle(**kw, **options),
        shapes=shapes,
        small_shapes=small,
        cast=("student", "teacher"),
        launches=1,
        opcheck=checked,
        empty_shape=(0, *shapes[0][1:]),
        tolerances={torch.bfloat16: (1e-4, 1e-6), torch.float16: (1e-4, 1e-6), torch.float32: (1e-4, 1e-6)},
    )


class TestStatistics(ConformanceSuite):
    cases = (
        statistics_case(
            "rows", [(9, 10), (4, 1000), (3, 3000), (2, 20_000)], [(5, 10), (2, 3000), (2, 20_000)]
        ),
        statistics_case("pixels", [(2, 19, 5, 3), (1, 150, 4, 4)], [(2, 5, 3, 2)], dim=1),
    )


def test_equals_what_people_write(target: Target) -> None:
    s, t = pair(8, 12, device=target.device)
    y = torch.arange(8, device=target.device)
    y[3] = IGNORED
    for smoothing in (0.0, 0.1):
        got = distillation_loss(
            s, t, y, temperature=4.0, kd_weight=0.9, ce_weight=0.1, label_smoothing=smoothing
        )
        want = 0.9 * kd_kl_div(s, t, 4.0) + 0.1 * F.cross_entropy(s, y, label_smoothing=smoothing)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    mixed = y.flip(0)
    got = distillation_loss(s, t, y, temperature=4.0, ce_weight=0.5, mixed_target=mixed, lam=0.3)
    want = kd_kl_div(s, t, 4.0) + 0.5 * (0.3 * F.cross_entropy(s, y) + 0.7 * F.cross_entropy(s, mixed))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 32, 33, 1024, 1025])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_ignored_labels_are_counted_for_any_number_of_rows(target: Target, rows: int, share: float) -> None:
    s, t = (x.requires_grad_() for x in pair(rows, 3, device=target.device))
    y = torch.arange(rows) % 3
    y[torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < share] = IGNORED
    counted = max(1, int((y != IGNORED).sum()))
    y = y.to(target.device)
    got = distillation_loss(s, t, y, temperature=2.0, kd_weight=0.0, ce_weight=0.5)
    want = 0.5 * F.cross_entropy(s, y, reduction="sum") / counted
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    grads = (torch.autograd.grad(loss, s)[0] for loss in (got, want))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def test_lam_takes_every_form(target: Target) -> None:
    s, t = pair(2, 5, 3, 2, device=target.device)
    y = torch.randint(5, (2, 3, 2)).to(target.device)
    options = {"temperature": 2.0, "ce_weight": 1.0, "mixed_target": y.flip(0), "dim": 1}
    want = distillation_loss(s, t, y, lam=0.25, **options)
    for lam in (torch.tensor(0.25), torch.full((2,), 0.25), torch.full((2, 3, 2), 0.25)):
        moved = lam.to(target.device)
        torch.testing.assert_close(distillation_loss(s, t, y, lam=moved, **options), want, rtol=1e-6, atol=0)


def test_all_ignored_is_zero_and_masked_rows_may_hold_anything(target: Target) -> None:
    s, t = pair(3, 6, device=target.device)
    s[1] = math.nan
    s = s.requires_grad_()
    y = torch.tensor([IGNORED, 2, IGNORED], device=s.device)
    mask = torch.tensor([True, False, True], device=s.device)
    options = {"temperature": 2.0, "kd_weight": 0.0, "ce_weight": 1.0, "mask": mask, "label_smoothing": 0.1}
    loss = distillation_loss(s, t, y, **options)
    (grad,) = torch.autograd.grad(loss, s)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_backward_repeats_and_scales(target: Target) -> None:
    s, t = (x.requires_grad_() for x in pair(6, 9, device=target.device))
    y = torch.arange(6, device=s.device)
    loss = distillation_loss(s, t, y, temperature=3.0, ce_weight=0.5, label_smoothing=0.1)
    first = torch.autograd.grad(loss, [s, t], retain_graph=True)
    five = torch.autograd.grad(loss, [s, t], torch.tensor(5.0, device=s.device), retain_graph=True)
    again = torch.autograd.grad(loss, [s, t])
    for one, more, same in zip(first, five, again, strict=True):
        torch.testing.assert_close(more, 5 * one, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(same, one, rtol=1e-6, atol=1e-8)


def test_nearly_equal_logits_with_labels(target: Target) -> None:
    s, t = pair(4, 11, device=target.device)
    t = s + 1e-3 * t
    s = s.requires_grad_()
    y = torch.arange(4, device=s.device)
    (got,) = torch.autograd.grad(distillation_loss(s, t, y, temperature=2.0, ce_weight=1.0), s)
    exact = s.detach().double().cpu().requires_grad_()
    loss = oracle(exact, t.double().cpu(), y.cpu(), temperature=2.0, ce_weight=1.0)
    (want,) = torch.autograd.grad(loss, exact)
    assert_verbose_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_double_backward(target: Target) -> None:
    s, t = pair(3, 5, device=target.device)
    s = s.requires_grad_()
    y = torch.arange(3, device=s.device)

    def penalty(x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad((first * first).sum(), x)[0]

    got = penalty(s, distillation_loss(s, t, y, temperature=2.0, ce_weight=0.5))
    exact = s.detach().double().cpu().requires_grad_()
    loss = oracle(exact, t.double().cpu(), y.cpu(), temperature=2.0, ce_weight=0.5)
    assert_verbose_allclose(got, penalty(exact, loss), rtol=1e-4, atol=1e-5)


def test_compiles_into_one_graph(target: Target) -> None:
    s, t = (x.requires_grad_() for x in pair(4, 9, device=target.device))
    y = torch.arange(4, device=s.device)

    def both(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = distillation_loss(
            a, b, y, temperature=2.0, ce_weight=0.5, mixed_target=y.flip(0), lam=0.3, label_smoothing=0.1
        )
        return loss, kd_statistics(a, b).kl

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    (got, got_kl), (want, want_kl) = compiled(s, t), both(s, t)
    torch.testing.assert_close(got_kl, want_kl)
    for g, w in zip(torch.autograd.grad(got, [s, t]), torch.autograd.grad(want, [s, t]), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


def test_statistics_carry_no_gradient(target: Target) -> None:
    s, t = (x.requires_grad_() for x in pair(4, 9, device=target.device))
    found = kd_statistics(s, t, torch.tensor(2.0, device=s.device))
    assert not any(x.requires_grad for x in found)
    assert (found.teacher_class.dtype, found.agreement.dtype) == (torch.int64, torch.bool)
    torch.testing.assert_close(found.kl, kd_kl_div(s, t, 2.0, reduction="none").detach() / 4)


def test_the_module_is_the_function(target: Target) -> None:
    s, t = pair(4, 7, device=target.device)
    y = torch.arange(4, device=s.device)
    module = DistillationLoss(3.0, kd_weight=0.9, ce_weight=0.1, label_smoothing=0.1)
    want = distillation_loss(s, t, y, temperature=3.0, kd_weight=0.9, ce_weight=0.1, label_smoothing=0.1)
    assert torch.equal(module(s, t, y), want)
    assert "ce_weight=0.1" in repr(module)


S, Y = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "error, match, options",
    [
        (ValueError, "target: got None", {"ce_weight": 1.0}),
        (ValueError, "target: got None", {"mixed_target": Y, "lam": 0.5}),
        (ValueError, "lam: got None", {"target": Y, "mixed_target": Y}),
        (ValueError, "mixed_target: got None", {"target": Y, "lam": 0.5}),
        (TypeError, "target: got dtype torch.float32", {"target": S[:, 0], "ce_weight": 1.0}),
        (TypeError, "target: got list", {"target": [0] * 4, "ce_weight": 1.0}),
        (ValueError, "target: got shape", {"target": Y[:3], "ce_weight": 1.0}),
        (ValueError, "target: got class 5", {"target": Y + 5, "ce_weight": 1.0}),
        (ValueError, "mixed_target: got class -1", {"target": Y, "mixed_target": Y - 1, "lam": 0.5}),
        (ValueError, "target: is on meta", {"target": Y.to("meta"), "ce_weight": 1.0}),
        (ValueError, "lam: got 1.5", {"target": Y, "mixed_target": Y, "lam": 1.5}),
        (TypeError, "lam: got str", {"target": Y, "mixed_target": Y, "lam": "half"}),
        (ValueError, "lam: got shape", {"target": Y, "mixed_target": Y, "lam": torch.ones(3)}),
        (TypeError, "lam: got dtype", {"target": Y, "mixed_target": Y, "lam": Y}),
        (ValueError, "label_smoothing: got 2", {"label_smoothing": 2.0}),
        (ValueError, "label_smoothing: got -1", {"label_smoothing": -1.0}),
        (ValueError, "kd_weight: got nan", {"kd_weight": math.nan}),
        (ValueError, "ce_weight: got -1", {"ce_weight": -1.0}),
        (TypeError, "ce_weight: got str", {"ce_weight": "some"}),
        (ValueError, "temperature: got 0", {"temperature": 0.0}),
        (ValueError, "reduction: got 'avg'", {"reduction": "avg"}),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        distillation_loss(S, S, **{"temperature": 2.0, **options})


def test_statistics_of_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="no classes"):
        kd_statistics(torch.zeros(3, 0), torch.zeros(3, 0))
