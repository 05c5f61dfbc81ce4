"""One behaviour for logits that are no numbers, on every backend and in every regime: NaN, never a finite loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdfast.functional import dist_loss, distillation_loss, dkd_loss, jsd_loss, kd_kl_div, topk_kd_loss
from tests.conftest import INTERPRETING, Target
from tests.support.machines import low_thresholds

#: Lengths that stand, under low thresholds, for rows of any length and alignment.
LENGTHS = (5, 13, 40)
TARGET, OTHER = 1, 3
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _classes(logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor([TARGET, TARGET], device=logits.device)


def _kept(logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[TARGET, OTHER, 0], [TARGET, OTHER, 0]], device=logits.device)


def _topk(**options: Any) -> Loss:
    return lambda s, t: topk_kd_loss(
        s, _kept(s), t.gather(1, _kept(s)), temperature=2.0, reduction="none", **options
    )


def _normalised(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    whole = torch.logsumexp(t.nan_to_num() / 2, -1)
    return _topk(log_normalizer=whole)(s, t)


LOSSES: dict[str, Loss] = {
    "kl": lambda s, t: kd_kl_div(s, t, 2.0, reduction="none"),
    "distillation": lambda s, t: distillation_loss(
        s, t, _classes(s), temperature=2.0, ce_weight=0.5, reduction="none"
    ),
    "jsd": lambda s, t: jsd_loss(s, t, temperature=2.0, reduction="none"),
    "dkd": lambda s, t: dkd_loss(s, t, _classes(s), temperature=2.0, reduction="none"),
    "dist": lambda s, t: dist_loss(s, t, temperature=2.0).expand(2),
    "topk": _topk(),
    "topk_normalised": _normalised,
    "topk_renormalised": _topk(tail="renormalize"),
}


@pytest.fixture(params=["90:132", "0:1"] if INTERPRETING else ["its own"])
def machine(request: pytest.FixtureRequest) -> Any:
    if not INTERPRETING:
        with contextlib.nullcontext():
            yield
        return
    from kdfast.kernels.machine import use_machine

    with low_thresholds(), use_machine(request.param):
        yield


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.usefixtures("machine")
def test_a_row_that_holds_no_number_is_nan(target: Target, name: str, value: float) -> None:
    """Student or teacher, in the target class or another: loss and gradient are NaN, the row beside it is right."""
    if name == "topk_normalised" and value == math.inf:
        pytest.skip("a cache with a finite normaliser and an infinite logit contradicts itself")
    loss = LOSSES[name]
    for length in LENGTHS:
        for role in (0, 1):
            for at in (TARGET, OTHER):
                generator = torch.Generator().manual_seed(length)
                pair = [torch.randn(2, length, generator=generator).to(target.device) for _ in range(2)]
                right = loss(*pair)
                pair[role][0, at] = value
                student = pair[0].requires_grad_()
                rows = loss(student, pair[1])
                rows.sum().backward()
                assert student.grad is not None
                where = f"V={length}, {('student', 'teacher')[role]}, class {at}: {rows.tolist()}"
                assert rows[0].isnan(), where
                assert student.grad[0].isnan().any(), where
                if name != "dist":  # which couples the rows
                    torch.testing.assert_close(rows[1], right[1])
                    assert student.grad[1].isfinite().all(), where


@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.usefixtures("machine")
def test_an_absent_target_has_no_odds(target: Target, role: int) -> None:
    for length in LENGTHS:
        pair = [torch.randn(2, length).to(target.device) for _ in range(2)]
        pair[role][0, TARGET] = -math.inf
        student = pair[0].requires_grad_()
        rows = LOSSES["dkd"](student, pair[1])
        rows.sum().backward()
        assert student.grad is not None
        assert rows[0].isnan()
        assert student.grad[0].isnan().any()
        assert rows[1].isfinite()


@pytest.mark.parametrize("wrong", [-1, 12, 2**40])
def test_a_class_that_does_not_exist_is_not_read(target: Target, wrong: int) -> None:
    """On a GPU labels are not looked at beforehand: an address far away would end the process."""
    if target.backend == "reference":
        pytest.skip("refused there: a label in host memory costs nothing to look at")
    from kdfast.kernels import pair as kernels
    from kdfast.kernels.common.launch_rows import Wanted
    from kdfast.kernels.common.scale import Scale

    student, teacher = (torch.randn(2, 12, device=target.device) for _ in range(2))
    classes = torch.tensor([wrong, TARGET], device=target.device)
    scale, own = Scale(2.0, 1.0, None, None), kernels.pair_arguments(kernels.DKD, classes, 1.0, 2.0)
    rows = kernels.PAIR((student, teacher), (None, None), 1, scale, Wanted(True, False), None, *own)
    assert rows[0].isnan()
    assert rows[1].isfinite()
