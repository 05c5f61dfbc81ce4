"""JSD, decoupled KD, DIST, cached top-k teachers: conformance, published forms, limits, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdfast import nn as knn
from kdfast.functional import dkd_loss, jsd_loss, kd_kl_div
from kdfast.ops import losses_more as ops
from tests.conformance import ConformanceSuite, OpCase, assert_verbose_allclose
from tests.conftest import INTERPRETING, Target


def reduced(rows: torch.Tensor, reduction: str, shape: torch.Size, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is not None:
        rows = torch.where(mask, rows, torch.zeros_like(rows))
    if reduction == "none":
        return rows
    count = rows.numel() if mask is None else max(1, int(mask.sum()))
    return rows.sum() / {"sum": 1, "mean": shape.numel(), "batchmean": shape[0], "rowmean": count}[reduction]


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
    return reduced(rows if row_weight is None else rows * row_weight, reduction, student.shape, mask)


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
    return reduced(rows if row_weight is None else rows * row_weight, reduction, shape, mask)


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
    row_loss = getattr(ops, loss.__name__.removesuffix("_loss"))

    def checked(inputs: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...]]:
        leaves = [inputs[key].requires_grad_() for key in ("student", "teacher")]
        dim = options.get("dim", -1) % leaves[0].dim()
        numbers = (options.get("alpha", 0.0), options["beta"])
        reduce = options.get("reduction", "batchmean") != "none"
        row = ops.Row(inputs.get("target"), None, numbers, dim, 2.0, None, None, 2.0, reduce)
        return row_loss.op, (*leaves, *ops._flat(row))

    return OpCase(
        name=name,
        make=make,
        run=lambda **kw: loss(**kw, **options),
        oracle=lambda **kw: oracle(**kw, **options),
        shapes=shapes,
        small_shapes=small,
        differentiable=("student", "teacher"),
        cast=("student", "teacher"),
        launches=1,
        tolerances={torch.float32: tolerance},
        opcheck=checked,
        empty_shape=(0, *shapes[0][1:]) if options.get("reduction") == "sum" else None,
    )


JSD = {"beta": 0.3, "temperature": 2.5}
DKD = {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}
LONG = (5e-4, 5e-5)  # a log-sum-exp of 20,000 terms rounds

# 10 and 19 classes: odd enough to break 16-byte loads; 1000: ImageNet; 3000: one row a program; 20000: does not
# fit on the chip; 300 across: class dimension 1 beyond the tile that holds it.
CASES = [
    case("jsd", jsd_loss, jsd_oracle, [(17, 10), (5, 19), (3, 1), (64, 1000)], [(5, 10), (3, 19), (2, 1)],
         reduction="sum", **JSD),  # fmt: skip
    case("jsd_skewed", jsd_loss, jsd_oracle, [(3, 5)], [(3, 5)], beta=0.95, temperature=1.0, reduction="mean"),
    case("jsd_rows", jsd_loss, jsd_oracle, [(9, 50), (2, 4, 21)], [(3, 50)], reduction="none", **JSD),
    case("jsd_long", jsd_loss, jsd_oracle, [(3, 3000), (2, 20_000)], [(2, 3000), (2, 20_000)], tolerance=LONG, **JSD),
    case("jsd_pixels", jsd_loss, jsd_oracle, [(2, 19, 13, 11), (1, 300, 4, 5)], [(2, 7, 3, 5)], dim=1, **JSD),
    case("jsd_weighted", jsd_loss, jsd_oracle, [(16, 12), (3, 5, 7, 4)], [(3, 5, 3, 4)], make=weighted(1), dim=1,
         reduction="rowmean", **JSD),  # fmt: skip
    case("dkd", dkd_loss, dkd_oracle, [(17, 10), (5, 19), (3, 2), (64, 1000)], [(5, 10), (3, 19), (2, 2)],
         make=labelled(pair), reduction="sum", **DKD),  # fmt: skip
    case("dkd_rows", dkd_loss, dkd_oracle, [(9, 50), (2, 4, 21)], [(3, 50)], make=labelled(pair),
         reduction="none", **DKD),  # fmt: skip
    case("dkd_long", dkd_loss, dkd_oracle, [(3, 3000), (2, 20_000)], [(2, 3000), (2, 20_000)], make=labelled(pair),
         tolerance=LONG, **DKD),  # fmt: skip
    case("dkd_pixels", dkd_loss, dkd_oracle, [(2, 19, 13, 11), (1, 300, 4, 5)], [(2, 7, 3, 5)],
         make=labelled(pair, 1), dim=1, **DKD),  # fmt: skip
    case("dkd_weighted", dkd_loss, dkd_oracle, [(16, 12), (3, 5, 7, 4)], [(3, 5, 3, 4)],
         make=labelled(weighted(1), 1), dim=1, reduction="rowmean", **DKD),  # fmt: skip
]  # fmt: skip


class TestConformance(ConformanceSuite):
    cases = CASES
