"""Batch norm's loops on a CPU: the numbers of the definition in float64, and whatever they cannot take left to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdfast.functional import bn_ddim_step, bn_mse, bn_relu
from kdfast.ops.norm import native
from kdfast.reference.native import extension
from kdfast.reference.norm import fused as reference
from kdfast.reference.norm.fused import BatchNorm
from tests.support.watched import Watched

pytestmark = pytest.mark.skipif(extension() is None, reason="the C++ extension is not built")


@pytest.fixture(autouse=True)
def _all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SMALLEST", 0)
    monkeypatch.setattr(native, "NARROWEST", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the loops ran."""
    watched = Watched(extension())
    monkeypatch.setattr(native, "extension", lambda: watched)
    return watched.ran


def _operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, beside, weight, bias, running mean and variance; all of a float32's values."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, beside = torch.randn(2, *shape, generator=generator)
    weight, bias, mean, var = torch.randn(4, shape[1], generator=generator)
    return [t.to(dtype) for t in (x * 2 + 3, beside, weight, bias, mean, var.abs() + 0.5)]


def _call(kind: str, given: list[Tensor], **options: Any) -> Tensor:
    x, beside, weight, bias, mean, var = given
    if kind == "step":
        return bn_ddim_step(beside, x, mean, var, weight, bias, c1=1.4, c2=-0.5, **options)
    if kind == "mse":
        return bn_mse(x, beside, mean, var, weight, bias, **options)
    residual = beside if kind.startswith("residual") else None
    return bn_relu(x, mean, var, weight, bias, residual=residual, relu=kind != "residual alone", **options)


KINDS = ["relu", "residual", "residual alone", "step", "mse"]


def _both_ways(kind: str, dtype: torch.dtype, shape: tuple[int, ...], training: bool) -> list[Tensor]:
    given = _operands(shape, dtype)
    leaves = [t.requires_grad_() for t in (given[0], given[2], given[3])]
    if kind in ("residual", "residual alone", "step"):
        leaves.append(given[1].requires_grad_())
    out = _call(kind, given, training=training, momentum=0.3)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=dtype).view(out.shape) if out.dim() else None
    return [out.detach(), *given[4:], *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 5, 7, 7), (2, 4, 300), (4, 2, 1, 3, 5), (1, 2, 40, 41)])
def test_results_and_gradients_are_those_of_float64(
    kind: str, shape: tuple[int, ...], training: bool, calls: list[str]
) -> None:
    found = _both_ways(kind, torch.float32, shape, training)
    assert calls, "the loops did not run"
    for got, want in zip(found, _both_ways(kind, torch.float64, shape, training), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


def test_threads_change_no_bit() -> None:
    shape, before = (32, 64, 28, 28), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [_both_ways(kind, torch.float32, shape, True) for kind in ("step", "mse")]
        torch.set_num_threads(3)
        shared = [_both_ways(kind, torch.float32, shape, True) for kind in ("step", "mse")]
    finally:
        torch.set_num_threads(before)
    for one, other in zip((*alone[0], *alone[1]), (*shared[0], *shared[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_and_a_second_derivative(kind: str) -> None:
    given = _operands((2, 3, 5, 5))
    given[0].requires_grad_()
    out = _call(kind, given, training=True).sum()
    first, again = (
        torch.autograd.grad(out, given[0], torch.tensor(2.5), retain_graph=True)[0] for _ in range(2)
    )
    torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-6)
    out = _call(kind, given, training=True).square().sum()
    (gradient,) = torch.autograd.grad(out, given[0], create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), given[0])
    exact = [t.detach().double() for t in given]
    exact[0].requires_grad_()
    (wanted,) = torch.autograd.grad(
        _call(kind, exact, training=True).square().sum(), exact[0], create_graph=True
    )
    (wanted,) = torch.autograd.grad(wanted.square().sum(), exact[0])
    torch.testing.assert_close(second.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["relu", "step", "mse"])
def test_a_batch_of_upstream_gradients(kind: str) -> None:
    given = _operands((2, 3, 5, 5))
    given[0].requires_grad_()
    out = _call(kind, given, training=True)
    upstream = torch.randn(4, *out.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(out, given[0], upstream, is_grads_batched=True, retain_graph=True)
    for got, one in zip(found, upstream, strict=True):
        (want,) = torch.autograd.grad(out, given[0], one, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "mse"])
def test_who_has_to_see_operators_does(kind: str, calls: list[str]) -> None:
    given = _operands((2, 3, 5, 5))

    def loss(x: Tensor) -> Tensor:
        return _call(kind, [x, *given[1:4], None, None], training=True).sum()  # type: ignore[list-item]

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(
            loss(forward_ad.make_dual(given[0], torch.ones_like(given[0])))
        ).tangent
    assert tangent is not None
    assert torch.func.grad(loss)(given[0]).shape == given[0].shape
    assert torch.func.vmap(loss)(given[0].expand(2, *given[0].shape)).shape == (2,)
    assert calls == []


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.double(),
        lambda t: t.bfloat16(),
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3),
    ],
)
def test_what_the_loops_do_not_take_is_left_to_the_definition(change: Any, calls: list[str]) -> None:
    given = _operands((2, 3, 4, 4))
    given[0] = change(given[0])
    norm = BatchNorm(given[2], given[3], None, None, None, True, 0.1, 1e-5)
    want = reference.bn_act(given[0], None, norm, True, 1.0, 1.0)[0]
    got = bn_relu(given[0], None, None, given[2], given[3], training=True)
    assert calls == []
    torch.testing.assert_close(got, want)


def test_not_a_number_stays_in_its_channel() -> None:
    given = _operands((2, 3, 5, 5))
    given[0][0, 1, 2, 2] = float("nan")
    out = _call("relu", given, training=True)
    assert bool(out[:, 1].isnan().all())
    assert bool(out[:, ::2].isfinite().all())


def test_statistics_that_autograd_kept_are_known_to_have_changed() -> None:
    given = _operands((2, 3, 5, 5))
    factor = torch.ones(3, requires_grad=True)
    kept = (factor * given[4]).sum()
    _call("relu", given, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
