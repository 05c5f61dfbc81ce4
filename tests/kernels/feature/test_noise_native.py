"""The error in ε in one loop of C++: the reference's numbers, its gradients of any order, and who must not take it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kdfast.functional import noise_mse
from kdfast.ops.feature import native
from kdfast.reference import feature as reference
from kdfast.reference.native import extension
from kdfast.reference.philox import normal
from tests.conftest import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel"),
    pytest.mark.skipif(extension() is None, reason="the extension was not built"),
]

SEED = 5


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each call of the loop, which takes predictions of any size here."""
    found: list[int] = []
    original = native.noise_mse
    monkeypatch.setattr(native, "SMALLEST_PREDICTION", 1)
    monkeypatch.setattr(native, "noise_mse", lambda *a, **k: found.append(1) or original(*a, **k))
    return found


def exact(prediction: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    error = prediction.detach().double() - normal(SEED, 0, tuple(prediction.shape))
    return error.square().mean(), error * (2 * factor / error.numel())


# Around vectors of 16, blocks of 256 normals and parts of 64 of them.
@pytest.mark.parametrize("count", [1, 3, 15, 16, 17, 255, 256, 257, 16383, 16384, 16385, 40_003])
def test_every_length(count: int, calls: list[int]) -> None:
    prediction = torch.randn(count, requires_grad=True)
    loss = noise_mse(prediction, seed=SEED)
    (grad,) = torch.autograd.grad(loss, prediction)
    want, slope = exact(prediction)
    assert calls == [1, 1]
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=1e-6 / count)
    assert torch.equal(noise_mse(prediction.detach(), seed=torch.tensor(SEED)), loss)


def test_an_upstream_gradient_and_a_second_backward() -> None:
    prediction = torch.randn(4, 100, requires_grad=True)
    loss = noise_mse(prediction, seed=SEED)
    for factor in (3.0, 1.0, -0.5, 0.0):  # the first from what the forward wrote, the others anew
        upstream = torch.tensor(factor)
        (grad,) = torch.autograd.grad(loss, prediction, upstream, retain_graph=True)
        torch.testing.assert_close(grad.double(), exact(prediction, factor)[1], rtol=1e-5, atol=1e-8)


def test_gradients_of_gradients_and_many_at_once_are_the_references() -> None:
    prediction = torch.randn(3, 50, requires_grad=True)
    loss = noise_mse(prediction, seed=SEED)
    (grad,) = torch.autograd.grad(loss, prediction, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), prediction)
    torch.testing.assert_close(second.double(), exact(prediction)[1] * (4 / 150), rtol=1e-5, atol=1e-8)
    factors = torch.tensor([1.0, -2.0])
    (many,) = torch.autograd.grad(loss, prediction, factors, is_grads_batched=True)
    want = torch.stack([exact(prediction, float(f))[1] for f in factors])
    torch.testing.assert_close(many.double(), want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 15, 299])
def test_what_is_no_number_stays_so(value: float, at: int) -> None:
    prediction = torch.randn(300)
    prediction[at] = value
    prediction.requires_grad_()
    loss = noise_mse(prediction, seed=SEED)
    (grad,) = torch.autograd.grad(loss, prediction)
    want = reference.noise_mse(prediction, SEED)
    torch.testing.assert_close(loss, want, equal_nan=True)
    torch.testing.assert_close(
        grad, torch.autograd.grad(want, prediction)[0], equal_nan=True, rtol=1e-5, atol=1e-8
    )


def test_more_threads_give_the_same_bits() -> None:
    prediction = torch.randn(300_001, requires_grad=True)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            loss = noise_mse(prediction, seed=SEED)
            found.append((loss.detach(), *torch.autograd.grad(loss, prediction)))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def _watched(prediction: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        return noise_mse(prediction, seed=SEED)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: noise_mse(x.bfloat16(), seed=SEED),
        lambda x: noise_mse(x.double(), seed=SEED),
        lambda x: noise_mse(x.t(), seed=SEED),
        lambda x: torch.func.grad(lambda y: noise_mse(y, seed=SEED))(x),
        _watched,
    ],
)
def test_others_go_through_operators(call: Any, calls: list[int]) -> None:
    call(torch.randn(6, 7))
    assert calls == []


def test_a_prediction_that_was_changed_since_is_refused() -> None:
    leaf = torch.randn(300, requires_grad=True)
    prediction = leaf * 1
    loss = noise_mse(prediction, seed=SEED)
    prediction.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
