"""Batch norm with what follows it: conformance, running statistics, layouts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.functional import bn_ddim_step, bn_mse, bn_relu
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose

C1, C2 = 1.426701, -0.502744
EPS = 1e-5
#: For the interpreter; 9 a channel is read in windows, as 49 is.
SMALL = [(2, 8, 3, 3), (5, 6)]


def make(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
    channels = shape[1]
    return {
        # A mean well off zero: a sum of squares would cancel.
        "x": torch.randn(shape, generator=generator) * 2 + 3,
        "other": torch.randn(shape, generator=generator),
        "weight": torch.rand(channels, generator=generator) + 0.5,
        "bias": torch.randn(channels, generator=generator),
        "mean": torch.randn(channels, generator=generator),
        "var": torch.rand(channels, generator=generator) + 0.5,
    }


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor:
    """Ioffe & Szegedy's Algorithm 1, written out."""
    channel = (1, -1, *[1] * (x.dim() - 2))
    if training:
        values = x.transpose(0, 1).flatten(1)
        mean, var = values.mean(1), values.var(1, correction=0)
    out = (x - mean.view(channel)) / (var.view(channel) + EPS).sqrt()
    return out * weight.view(channel) + bias.view(channel)


def relu_case(name: str, training: bool, residual: bool, relu: bool) -> OpCase:
    def run(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        held = (None, None) if training else (mean, var)
        return bn_relu(x, *held, weight, bias, training, residual=other if residual else None, relu=relu)

    def oracle(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        out = batch_norm(x, weight, bias, mean, var, training) + (other if residual else 0)
        return out.relu() if relu else out

    def opcheck(i: dict[str, Tensor]) -> Any:
        leaves = [i[k].requires_grad_() for k in ("x", "other", "weight", "bias")]
        if not residual:
            leaves[1] = None  # type: ignore[call-overload]
        held = (None, None) if training else (i["mean"], i["var"])
        return torch.ops.kdfast.bn_act.default, (*leaves, *held, training, EPS, relu, 1.0, 1.0)

    return OpCase(
        name=name,
        make=make,
        run=run,
        oracle=oracle,
        # 49 a channel is odd and read in windows; [B, C] logits; spans in chunks; several parts a channel.
        shapes=[(4, 8, 7, 7), (5, 10), (2, 3, 20, 20), (40, 24, 5, 6), (3, 70, 4)],
        small_shapes=SMALL if name != "relu" else [*SMALL, (2, 8, 7, 7), (2, 3, 5, 4), (9, 4, 12)],
        differentiable=["x", "weight", "bias", *(["other"] if residual else [])],
        cast=["x", "other", "weight", "bias"],
        launches=2 if training else 1,
        opcheck=opcheck,
        tolerances=TOLERANCES,
    )


#: A channel's gradients are sums of terms that nearly cancel; half types round the result and what is compared to.
TOLERANCES = {
    torch.float32: (5e-5, 5e-5),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (2e-2, 2e-2),
}


def step_case() -> OpCase:
    def run(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return bn_ddim_step(other, x, mean.clone(), var.clone(), weight, bias, True, c1=C1, c2=C2)

    def oracle(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return C1 * other + C2 * batch_norm(x, weight, bias, mean, var, True)

    return OpCase(
        name="ddim",
        make=make,
        run=run,
        oracle=oracle,
        shapes=[(4, 8, 7, 7), (5, 10)],
        small_shapes=SMALL,
        differentiable=["x", "other", "weight", "bias"],
        cast=["x", "other", "weight", "bias"],
        launches=2,
        tolerances=TOLERANCES,
    )


def mse_case(name: str, training: bool) -> OpCase:
    def run(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        held = (None, None) if training else (mean, var)
        return bn_mse(x, other, *held, weight, bias, training)

    def oracle(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (batch_norm(x, weight, bias, mean, var, training) - other).square().mean()

    def opcheck(i: dict[str, Tensor]) -> Any:
        x, weight, bias = (i[k].requires_grad_() for k in ("x", "weight", "bias"))
        held = (None, None) if training else (i["mean"], i["var"])
        return torch.ops.kdfast.bn_mse.default, (x, i["other"], weight, bias, *held, training, EPS, True)

    return OpCase(
        name=name,
        make=make,
        run=run,
        oracle=oracle,
        shapes=[(4, 8, 7, 7), (5, 10), (2, 3, 20, 20), (40, 24, 5, 6)],
        small_shapes=SMALL,
        differentiable=["x", "weight", "bias"],
        cast=["x", "other", "weight", "bias"],
        launches=2 if training else 1,
        opcheck=opcheck,
        tolerances=TOLERANCES,
    )


class TestConformance(ConformanceSuite):
    cases = (
        relu_case("relu", True, False, True),
        relu_case("residual", True, True, False),
        relu_case("residual_relu", True, True, True),
        relu_case("relu_eval", False, False, True),
        step_case(),
        mse_case("mse", True),
        mse_case("mse_eval", False),
    )


def leaves(shape: tuple[int, ...], target: Target, *, grad: bool = True) -> list[Tensor]:
    """x, another tensor of its shape, weight, bias."""
    made = make(torch.Generator().manual_seed(5), shape)
    found = [made[k].to(target.device) for k in ("x", "other", "weight", "bias")]
    return [t.requires_grad_() for t in found] if grad else found


@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, 0.0, None])
@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (6, 5)])
def test_running_statistics_are_those_of_the_module(
    target: Target, momentum: float | None, shape: tuple[int, ...]
) -> None:
    x, other, _, _ = leaves(shape, target, grad=False)
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    norms = [kind(shape[1], momentum=momentum).to(x.device) for _ in range(4)]
    for turn in range(3):
        x = x + turn
        norms[0](x)
        for at, call in enumerate((bn_relu, bn_ddim_step, bn_mse), start=1):
            n = norms[at]
            held = (n.running_mean, n.running_var, n.weight, n.bias, True, momentum, n.eps)
            count = {"num_batches_tracked": n.num_batches_tracked}
            if call is bn_relu:
                call(x, *held, **count)
            elif call is bn_ddim_step:
                call(other, x, *held, c1=1.0, c2=0.5, **count)
            else:
                call(x, other, *held, **count)
    for norm in norms[1:]:
        for key, value in norms[0].state_dict().items():
            torch.testing.assert_close(norm.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert norms[1].num_batches_tracked == 3


def test_evaluation_leaves_running_statistics_alone(target: Target) -> None:
    x, other, weight, bias = leaves((4, 6, 3, 3), target)
    mean, var, count = torch.rand(6), torch.rand(6), torch.tensor(7)
    held = [t.clone().to(target.device) for t in (mean, var, count)]
    (bn_relu(x, *held[:2], weight, bias, num_batches_tracked=held[2]).sum()).backward()
    bn_mse(x, other.detach(), *held[:2], weight, bias, num_batches_tracked=held[2]).backward()
    for got, want in zip(held, (mean, var, count), strict=True):
        assert torch.equal(got.cpu(), want)


def test_running_statistics_may_be_views(target: Target) -> None:
    x, *_ = leaves((4, 6, 3, 3), target, grad=False)
    both = torch.zeros(6, 2, device=x.device)
    both[:, 1] = 1
    want = [torch.zeros(6, device=x.device), torch.ones(6, device=x.device)]
    bn_relu(x, both[:, 0], both[:, 1], training=True)
    F.batch_norm(x, *want, training=True)
    torch.testing.assert_close(both, torch.stack(want, 1), rtol=1e-5, atol=1e-6)


def test_without_weight_and_bias_they_are_one_and_zero(target: Target) -> None:
    x, other, *_ = leaves((4, 6, 3, 3), target)
    one, zero = torch.ones(6, device=x.device), torch.zeros(6, device=x.device)
    for call in (
        lambda *affine: bn_relu(x, None, None, *affine, training=True, residual=other),
        lambda *affine: bn_mse(x, other.detach(), None, None, *affine, training=True),
    ):
        got, want = call(), call(one, zero)
        torch.testing.assert_close(got, want)
        found = [torch.autograd.grad(out.square().sum(), x)[0] for out in (got, want)]
        torch.testing.assert_close(*found)


def test_a_large_mean_does_not_swallow_a_small_variance(target: Target) -> None:
    x = 1000 + 0.01 * torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    got = bn_relu(x.to(target.device), training=True, relu=False)
    want = F.batch_norm(x.double(), None, None, training=True)
    # 1000 in float32 is exact to 6e-5, which is 6e-3 of this deviation; the statistics must not add to that.
    assert_verbose_allclose(got, want, rtol=0, atol=2e-2)


def test_results_repeat_bit_by_bit(target: Target) -> None:
    x, other, weight, bias = leaves((4, 6, 7, 7), target)

    def once() -> list[Tensor]:
        out = bn_relu(x, None, None, weight, bias, True, residual=other)
        loss = bn_mse(x, other.detach(), None, None, weight, bias, True)
        return [out, loss, *torch.autograd.grad(out.square().sum() + loss, (x, weight, bias))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_sample_keeps_its_dtype_beside_a_half_prediction(target: Target, dtype: Any) -> None:
    x, sample, weight, bias = leaves((4, 6, 3, 3), target)
    half = x.detach().to(dtype).requires_grad_()
    out = bn_ddim_step(sample, half, None, None, weight, bias, True, c1=C1, c2=C2)
    assert out.dtype == torch.float32
    want = C1 * sample + C2 * F.batch_norm(half.float(), None, None, weight, bias, True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), (sample, half))
    assert [g.dtype for g in grads] == [torch.float32, dtype]


def test_five_steps_with_the_true_noise_recover_the_latent(target: Target) -> None:
    """BN of any multiple of normalised noise is that noise, which is ε̂ here."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 2, 2, 2, generator=generator)
    noise = F.batch_norm(noise, None, None, training=True, eps=1e-12).to(target.device)
    x0 = torch.randn(8, 2, 2, 2, generator=generator).to(target.device)
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x = (bars[400].sqrt() * x0 + (1 - bars[400]).sqrt() * noise).float()
    for t in (400, 300, 200, 100, 0):
        bar, after = float(bars[t]), float(bars[t - 100]) if t else 1.0
        c1 = (after / bar) ** 0.5
        c2 = (1 - after) ** 0.5 - c1 * (1 - bar) ** 0.5
        x = bn_ddim_step(x, 3 * noise + 1, training=True, eps=1e-12, c1=c1, c2=c2)
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_second_backward_finds_the_gradients_again(target: Target, factor: float) -> None:
    x, other, weight, bias = leaves((4, 6, 3, 3), target)
    loss = bn_mse(x, other.detach(), None, None, weight, bias, True)
    want = torch.autograd.grad(
        F.mse_loss(F.batch_norm(x, None, None, weight, bias, True), other.detach()) * factor,
        (x, weight, bias),
    )
    for _ in range(2):
        got = torch.autograd.grad(loss * factor, (x, weight, bias), retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_gradients_only_where_they_are_needed(target: Target) -> None:
    tensors = leaves((4, 6, 3, 3), target, grad=False)

    def calls(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        act = bn_relu(x, None, None, w, b, True, residual=r).square().sum()
        plain = bn_ddim_step(r, x, None, None, w, b, True, c1=C1, c2=C2).square().sum()
        return act + plain + bn_mse(x, r.detach(), None, None, w, b, True)

    every = [t.clone().requires_grad_() for t in tensors]
    wanted = torch.autograd.grad(calls(*every), every)
    for at in range(4):
        some = [t.clone() for t in tensors]
        some[at].requires_grad_()
        got = torch.autograd.grad(calls(*some), some[at])[0]
        torch.testing.assert_close(got, wanted[at], rtol=1e-5, atol=1e-6)


def test_gradients_can_be_differentiated_again(target: Target) -> None:
    tensors = leaves((4, 3, 3), target, grad=False)

    def second(dtype: torch.dtype, kind: str) -> Tensor:
        x, r, w, b = (t.detach().to(dtype).requires_grad_() for t in tensors)
        if kind == "mse":
            out = bn_mse(x, r.detach(), None, None, w, b, True)
        elif kind == "step":
            out = bn_ddim_step(r, x, None, None, w, b, True, c1=C1, c2=C2)
        else:
            out = bn_relu(x, None, None, w, b, True, residual=r if kind == "residual" else None)
        (first,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    for kind in ("relu", "residual", "step", "mse"):
        want = second(torch.float64, kind)
        assert_verbose_allclose(
            second(torch.float32, kind), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()), what=kind
        )


@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
def test_gradcheck_in_float64() -> None:
    x, r, w, b = (t.detach().double().requires_grad_() for t in leaves((3, 2, 4), Target("reference", "cpu")))
    for training in (True, False):
        held = (None, None) if training else (torch.rand(2).double(), torch.rand(2).double() + 0.5)
        checked = [
            torch.autograd.gradcheck(
                lambda x, r, w, b, held=held, training=training: bn_relu(
                    x, *held, w, b, training, residual=r, relu=False
                ),
                (x, r, w, b),
            ),
            torch.autograd.gradcheck(
                lambda x, w, b, held=held, training=training: bn_mse(x, r.detach(), *held, w, b, training),
                (x, w, b),
            ),
        ]
        assert all(checked)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_is_eager(target: Target, training: bool) -> None:
    x, other, weight, bias = leaves((4, 6, 3, 3), target)
    held = [[torch.zeros(6), torch.ones(6), torch.tensor(0)] for _ in range(2)]
    held = [[t.to(x.device) for t in each] for each in held]

    def call(stats: list[Tensor]) -> Tensor:
        mean, var, count = stats
        y = bn_relu(x * 1.5, mean, var, weight, bias, training, None, num_batches_tracked=count)
        y = bn_ddim_step(other, y, None, None, weight, bias, True, c1=C1, c2=C2)
        return bn_mse(y, other.detach(), mean, var, weight, bias, training, 0.3, num_batches_tracked=count)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = compiled(held[0]), call(held[1])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    found = [torch.autograd.grad(loss, (x, weight, bias, other)) for loss in (got, want)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*held, rtol=1e-5, atol=1e-6)
    assert int(held[0][2]) == (2 if training else 0)


X, W = torch.zeros(2, 3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "x: got dtype", lambda: bn_relu(X.int(), training=True)),
        (TypeError, "x: got list", lambda: bn_relu([0.0], training=True)),  # type: ignore[arg-type]
        (ValueError, r"x: got shape \(2,\)", lambda: bn_relu(X[:, 0, 0], training=True)),
        (ValueError, "1 values a channel", lambda: bn_relu(X[:1, :, 0], training=True)),
        (ValueError, "0 values a channel", lambda: bn_relu(X[:0], training=True)),
        (ValueError, "weight: got shape", lambda: bn_relu(X, weight=W[:2], training=True)),
        (ValueError, "bias: is on meta", lambda: bn_relu(X, bias=W.to("meta"), training=True)),
        (TypeError, "running_mean: got dtype", lambda: bn_relu(X, W.int(), W)),
        (ValueError, "running_var: requires grad", lambda: bn_relu(X, W, W.clone().requires_grad_())),
        (ValueError, "both or neither", lambda: bn_relu(X, W)),
        (ValueError, "training: got False", lambda: bn_relu(X)),
        (ValueError, "eps: got 0.0", lambda: bn_relu(X, W, W, eps=0.0)),
        (ValueError, "momentum: got 2", lambda: bn_relu(X, W, W, momentum=2)),
        (ValueError, "without num_batches_tracked", lambda: bn_relu(X, W, W, training=True, momentum=None)),
        (TypeError, "num_batches_tracked: got", lambda: bn_relu(X, W, W, num_batches_tracked=W[:1])),
        (
            ValueError,
            r"num_batches_tracked: got shape \(2,\)",
            lambda: bn_relu(X, W, W, num_batches_tracked=torch.zeros(2, dtype=torch.int64)),
        ),
        (ValueError, "residual: got shape", lambda: bn_relu(X, W, W, residual=X[:1])),
        (ValueError, "sample: is on meta", lambda: bn_ddim_step(X.to("meta"), X, W, W, c1=1.0, c2=1.0)),
        (TypeError, "c1: got str", lambda: bn_ddim_step(X, X, W, W, c1="1", c2=1.0)),  # type: ignore[arg-type]
        (ValueError, "c2: got nan", lambda: bn_ddim_step(X, X, W, W, c1=1.0, c2=float("nan"))),
        (ValueError, "target: requires grad", lambda: bn_mse(X, X.clone().requires_grad_(), W, W)),
        (TypeError, "target: got dtype", lambda: bn_mse(X, X.int(), W, W)),
        (ValueError, "mean of no elements", lambda: bn_mse(X[:0], X[:0], W, W)),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()
