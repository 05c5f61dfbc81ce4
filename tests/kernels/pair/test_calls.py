"""JSD and decoupled KD: gradcheck, what they refuse, and their modules."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from kdfast import nn as knn
from kdfast.functional import dkd_loss, jsd_loss
from tests.conftest import INTERPRETING, Target
from tests.kernels.pair.test_pair import PAIRED, classes, jsd_of, logits


@PAIRED
@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
def test_gradcheck_in_float64(loss: Any, exact: Any) -> None:
    s, t = (x.double().requires_grad_() for x in logits(3, 5))
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b), (s, t))
    assert torch.autograd.gradgradcheck(lambda a, b: loss(a, b), (s, t))


S = torch.zeros(4, 5)
Y = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (ValueError, "beta: got 1.5", lambda: jsd_loss(S, S, beta=1.5)),
        (ValueError, "beta: got -0.1", lambda: jsd_loss(S, S, beta=-0.1)),
        (ValueError, "beta: got nan", lambda: jsd_loss(S, S, beta=math.nan)),
        (TypeError, "beta: got str", lambda: jsd_loss(S, S, beta="half")),
        (ValueError, "temperature: got 0", lambda: jsd_loss(S, S, temperature=0.0)),
        (ValueError, "reduction: got 'avg'", lambda: jsd_loss(S, S, reduction="avg")),
        (ValueError, "teacher: got shape", lambda: jsd_loss(S, S[:, :4])),
        (ValueError, "dim: got 2", lambda: jsd_loss(S, S, dim=2)),
        (TypeError, "mask: got dtype", lambda: jsd_loss(S, S, mask=torch.ones(4))),
        (ValueError, "row_weight: got shape", lambda: jsd_loss(S, S, row_weight=S)),
        (TypeError, "student: got dtype", lambda: dkd_loss(S.int(), S, Y)),
        (ValueError, "alpha: got -1", lambda: dkd_loss(S, S, Y, alpha=-1.0)),
        (ValueError, "beta: got inf", lambda: dkd_loss(S, S, Y, beta=math.inf)),
        (TypeError, "target: got list", lambda: dkd_loss(S, S, [0] * 4)),
        (TypeError, "target: got dtype", lambda: dkd_loss(S, S, Y.float())),
        (ValueError, "target: got shape", lambda: dkd_loss(S, S, Y[:3])),
        (ValueError, "target: got class 5", lambda: dkd_loss(S, S, Y + 5)),
        (ValueError, "target: got class -1", lambda: dkd_loss(S, S, Y - 1)),
        (ValueError, "target: is on meta", lambda: dkd_loss(S, S, Y.to("meta"))),
        (ValueError, "at least 2", lambda: dkd_loss(S[:, :1], S[:, :1], Y)),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()


def test_modules_are_the_functions(target: Target) -> None:
    s, t = logits(4, 7, device=target.device)
    y = classes(4, below=7, device=target.device)
    assert torch.equal(knn.JSDLoss(0.3, 2.0)(s, t), jsd_of(s, t))
    assert torch.equal(
        knn.DKDLoss(2.0, 3.0, 2.0)(s, t, y), dkd_loss(s, t, y, alpha=2.0, beta=3.0, temperature=2.0)
    )
    assert "beta=0.3" in repr(knn.JSDLoss(0.3))
    assert "alpha=2.0" in repr(knn.DKDLoss(2.0))


@pytest.mark.parametrize(
    "made",
    [
        knn.KDLoss(2.0), knn.DistillationLoss(3.0), knn.JSDLoss(0.3), knn.DKDLoss(2.0), knn.TopKKDLoss(),
        knn.DISTLoss(), knn.FusedLinearKDLoss(chunk_rows=2),
    ],
    ids=lambda made: type(made).__name__,
)  # fmt: skip
def test_a_modules_options_are_attributes_that_are_printed_and_handed_on(made: Any) -> None:
    parameters = inspect.signature(type(made)).parameters
    assert set(made.options) == set(parameters) - {"process_group"}
    made.temperature = 7.0
    assert made.options["temperature"] == 7.0
    shown = [f"{name}={value!r}" for name, value in made.options.items()]
    left = ["ignore_index=-100"] if isinstance(made, knn.DistillationLoss) else []
    assert repr(made) == f"{type(made).__name__}({', '.join(part for part in shown if part not in left)})"
    assert made.state_dict() == {}


def test_a_module_that_is_derived_may_take_what_it_likes() -> None:
    class Warm(knn.KDLoss):
        def __init__(self, degrees: float) -> None:
            super().__init__(degrees + 1)

    s, t = torch.randn(2, 3, 5)
    assert torch.equal(Warm(3.0)(s, t), knn.KDLoss(4.0)(s, t))
