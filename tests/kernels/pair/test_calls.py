"""JSD and decoupled KD: gradcheck, what they refuse, and their modules."""

from __future__ import annotations

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
