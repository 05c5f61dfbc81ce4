"""Batch-norm statistics: conformance, the average, the loss of a whole network, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdfast.functional import bn_statistics_loss
from kdfast.nn import BNStatisticsLoss
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose


def make(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
    channels = shape[1]
    return {
        "x": torch.randn(shape, generator=generator) * 1.5 + 0.5,
        "mean": torch.randn(channels, generator=generator),
        "var": torch.rand(channels, generator=generator) + 0.5,
        "average_mean": torch.randn(channels, generator=generator),
        "average_var": torch.rand(channels, generator=generator) + 0.5,
        "share": torch.tensor(0.75),
    }


def written_out(x: Tensor, mean: Tensor, var: Tensor, average: Any = None, *, squared: bool = False) -> Any:
    """The loss, channel by channel."""
    own = x.transpose(0, 1).flatten(1)
    m, v = own.mean(1), (own - own.mean(1, keepdim=True)).square().mean(1)
    seen = m.detach(), v.detach()
    if average is not None:
        k, old_mean, old_var = average
        m, v = (1 - k) * m + k * old_mean, (1 - k) * v + k * old_var
    gaps = (mean - m).square().sum(), (var - v).square().sum()
    return (gaps[0] + gaps[1] if squared else gaps[0].sqrt() + gaps[1].sqrt()), *seen


def case(name: str, *, averaged: bool = False, squared: bool = False) -> OpCase:
    def run(
        x: Tensor, mean: Tensor, var: Tensor, average_mean: Tensor, average_var: Tensor, share: Tensor
    ) -> Any:
        extra = {"average_mean": average_mean, "average_var": average_var, "average_share": share}
        return tuple(bn_statistics_loss(x, mean, var, squared=squared, **(extra if averaged else {})))  # type: ignore[arg-type]

    def oracle(
        x: Tensor, mean: Tensor, var: Tensor, average_mean: Tensor, average_var: Tensor, share: Tensor
    ) -> Any:
        return written_out(
            x, mean, var, (share, average_mean, average_var) if averaged else None, squared=squared
        )

    def opcheck(inputs: dict[str, Tensor]) -> tuple[Any, tuple[Any, ...]]:
        average = [inputs[key] if averaged else None for key in ("average_mean", "average_var", "share")]
        x = inputs["x"].requires_grad_()
        return torch.ops.kdfast.bn_statistics.default, (x, inputs["mean"], inputs["var"], *average, squared)

    return OpCase(
        name=name,
        make=make,
        run=run,
        oracle=oracle,
        # 7×7 planes begin anywhere; 70 channels are two blocks of NHWC; more samples than programs; 33×33 is two tiles
        # a plane; [N, C] and [N, C, L].
        shapes=[
            (6, 16, 7, 7),
            (5, 3, 4, 4),
            (3, 70, 2, 3),
            (40, 4, 16, 16),
            (2, 2, 33, 33),
            (9, 5),
            (4, 3, 6),
        ],
        small_shapes=[(3, 8, 7, 7), (3, 70, 2, 3), (20, 2, 8, 8), (2, 1, 33, 33), (9, 5), (2, 3, 6)],
        differentiable=["x"],
        cast=["x"],
        launches=1,
        opcheck=opcheck,
        # A sum of squares of gaps that may be near 0; squares double the relative error.
        tolerances={torch.float32: (5e-5, 5e-6), torch.bfloat16: (1.6e-2, 4e-3), torch.float16: (2e-3, 5e-4)},
    )


class TestConformance(ConformanceSuite):
    cases = (case("norms"), case("averaged", averaged=True), case("squared", averaged=True, squared=True))


def drawn(target: Target, *shape: int) -> dict[str, Tensor]:
    made = make(torch.Generator().manual_seed(4), shape)
    return {key: value.to(target.device) for key, value in made.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_layouts_of_many_programs_agree(target: Target, dtype: torch.dtype, layout: Any) -> None:
    """Several programs share a channel here, in the interpreter, too."""
    shape = (33, 24, 7, 7) if not INTERPRETING else (70, 3, 7, 7)
    made = drawn(target, *shape)
    x = made["x"].to(dtype).contiguous(memory_format=layout).requires_grad_()
    got = bn_statistics_loss(x, made["mean"], made["var"])
    wide = x.detach().double().cpu().requires_grad_()
    want = written_out(wide, made["mean"].double().cpu(), made["var"].double().cpu())
    for a, b in zip(got, want, strict=True):
        assert_verbose_allclose(a, b, rtol=2e-5, atol=1e-5)
    grads = torch.autograd.grad(got.loss, x)[0], torch.autograd.grad(want[0], wide)[0]
    assert grads[0].is_contiguous(memory_format=layout)
    rtol = 1e-2 if dtype == torch.bfloat16 else 2e-5
    assert_verbose_allclose(grads[0], grads[1], rtol=rtol, atol=0.1 * rtol * float(grads[1].abs().max()))


@pytest.mark.parametrize("channels", [1024, 1100])
def test_the_last_program_goes_on_to_the_next_channels(target: Target, channels: int) -> None:
    made = drawn(target, 3, channels)
    got = bn_statistics_loss(made["x"], made["mean"], made["var"])
    want = written_out(*(made[key].double().cpu() for key in ("x", "mean", "var")))
    for a, b in zip(got, want, strict=True):
        assert_verbose_allclose(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("channels", [64, 2048, 9000])
def test_the_last_program_holds_eight_channels_a_thread(channels: int, nhwc: bool) -> None:
    """Sixteen took 121 registers of sm_90 instead of 64, and spilled 17 instructions of Triton 3.6."""
    pytest.importorskip("triton")
    from kdfast.kernels.norm.statistics_loss import statistics_plan

    for samples in (1, 256):
        plan = statistics_plan(samples, channels, 49, 2, nhwc)
        assert plan.finish_width <= 8 * 128
        assert plan.finish_rows * plan.finish_width <= 4096


def test_statistics_are_those_of_a_training_batch_norm(target: Target) -> None:
    made = drawn(target, 6, 5, 4, 4)
    layer = nn.BatchNorm2d(5, momentum=1.0).to(target.device)
    layer(made["x"])
    found = bn_statistics_loss(made["x"], made["mean"], made["var"])
    torch.testing.assert_close(found.mean, layer.running_mean)
    torch.testing.assert_close(found.var * (96 / 95), layer.running_var)  # running ones are unbiased
    assert not found.mean.requires_grad
    assert not found.var.requires_grad


def test_what_the_layer_remembers_costs_nothing_and_moves_nothing(target: Target) -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 9.0]], device=target.device).requires_grad_()
    mean, var = torch.tensor([2.0, 7.0], device=x.device), torch.tensor([1.0, 4.0], device=x.device)
    for squared in (False, True):
        loss = bn_statistics_loss(x, mean, var, squared=squared).loss
        assert loss == 0
        assert not torch.autograd.grad(loss, x)[0].any()


def test_a_batch_far_from_the_running_mean_keeps_its_variance(target: Target) -> None:
    """Ten standard deviations away; the bound of the kernel file is (d/σ)² = 100 units in the last place."""
    x = drawn(target, 64, 3, 8, 8)["x"]
    mean, var = x.mean((0, 2, 3)) + 15.0, torch.ones(3, device=x.device)
    found = bn_statistics_loss(x, mean, var)
    torch.testing.assert_close(
        found.var.cpu().double(), x.cpu().double().var((0, 2, 3), correction=0), rtol=2e-5, atol=0
    )


def test_a_share_of_0_or_1_is_the_batch_or_the_average(target: Target) -> None:
    made = drawn(target, 4, 3, 5, 5)
    x = made["x"].requires_grad_()
    plain = bn_statistics_loss(x, made["mean"], made["var"]).loss

    def with_share(share: float) -> Tensor:
        average = {key: made[key] for key in ("average_mean", "average_var")}
        return bn_statistics_loss(x, made["mean"], made["var"], average_share=share, **average).loss

    torch.testing.assert_close(with_share(0.0), plain)
    all_average = with_share(1.0)
    gaps = made["mean"] - made["average_mean"], made["var"] - made["average_var"]
    torch.testing.assert_close(all_average, gaps[0].norm() + gaps[1].norm())
    assert not torch.autograd.grad(all_average, x)[0].any()
    assert plain != with_share(0.5) != all_average


def test_results_do_not_change_from_run_to_run(target: Target) -> None:
    made = drawn(target, 33, 4, 7, 7)
    results = [bn_statistics_loss(made["x"], made["mean"], made["var"]) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_can_be_differentiated_again(target: Target) -> None:
    made = drawn(target, 3, 2, 3, 3)

    def second(dtype: torch.dtype) -> Tensor:
        x, mean, var = (made[key].detach().to(dtype) for key in ("x", "mean", "var"))
        x.requires_grad_()
        (first,) = torch.autograd.grad(bn_statistics_loss(x, mean, var).loss.pow(2), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert_verbose_allclose(second(torch.float32), second(torch.float64), rtol=1e-4, atol=1e-6)


def test_compiled_is_eager(target: Target) -> None:
    made = drawn(target, 4, 3, 5, 5)
    x = made["x"].requires_grad_()

    def call(x: Tensor) -> Tensor:
        return bn_statistics_loss(x * 1.5, made["mean"], made["var"]).loss * 2.0

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(x), x) for f in (compiled, call))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_torch_func_sees_the_same_gradient(target: Target) -> None:
    made = drawn(target, 4, 3, 5, 5)

    def call(x: Tensor) -> Tensor:
        return bn_statistics_loss(x, made["mean"], made["var"]).loss

    got = torch.func.grad(call)(made["x"])
    x = made["x"].requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(call(x), x)[0], rtol=1e-5, atol=1e-7)


# --- a whole network -----------------------------------------------------------------------------------------


def network(device: str) -> nn.Module:
    """Trained a little, so that running statistics are neither 0 nor 1."""
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AvgPool2d(2),
        nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.BatchNorm1d(5),
    ).to(device)  # fmt: skip
    for _ in range(3):
        net(torch.rand(8, 3, 8, 8, device=device))
    return net.eval().requires_grad_(False)


def by_hand(net: nn.Module, images: Tensor, *, squared: bool = False) -> tuple[Tensor, Tensor, list[Any]]:
    """Output, loss and statistics, layer after layer."""
    x, total, seen = images, images.new_zeros(()), []
    for layer in net:  # type: ignore[attr-defined]
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            loss, *found = written_out(x, layer.running_mean, layer.running_var, squared=squared)
            total = total + loss
            seen.append(found)
        x = layer(x)
    return x, total, seen


@pytest.mark.parametrize("squared", [False, True])
def test_the_network_s_loss_is_its_layers_and_leaves_its_output_alone(target: Target, squared: bool) -> None:
    net = network(target.device)
    images = torch.rand(4, 3, 8, 8, device=target.device).requires_grad_()
    want_out, want, _ = by_hand(net, images, squared=squared)
    with BNStatisticsLoss(net, squared=squared) as statistics:
        out = net(images)
        loss = statistics.loss()
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(loss, want)
    # Both gradients of every batch norm's input, at once and each alone.
    for pick in (lambda a, b: a + b.square().sum(), lambda a, b: a * 1.0, lambda a, b: b.square().sum()):
        got = torch.autograd.grad(pick(loss, out), images, retain_graph=True)
        expected = torch.autograd.grad(pick(want, want_out), images, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_norm_takes_a_launch_each_way(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("nothing is launched")
    from kdfast.kernels.launch import count_launches

    net = network(target.device)
    images = torch.rand(2, 3, 8, 8, device=target.device).requires_grad_()
    with BNStatisticsLoss(net) as statistics:
        with count_launches() as counts:
            loss = net(images).square().sum() + statistics.loss()
        assert counts == {"bn_statistics_kernel": 3}
    with count_launches() as counts:
        torch.autograd.grad(loss, images)
    assert counts == {"bn_statistics_backward_kernel": 3}


def test_detached_the_network_carries_no_hook(target: Target) -> None:
    net = network(target.device)

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in net.modules())

    statistics = BNStatisticsLoss(net)
    assert hooks() == 0
    assert not statistics.attached
    statistics.attach()
    statistics.attach()
    assert hooks() == 4
    assert statistics.attached
    net(torch.rand(2, 3, 8, 8, device=target.device))
    statistics.detach()
    assert hooks() == 0
    with pytest.raises(RuntimeError, match="nothing was collected"):
        statistics.loss()


def test_each_forward_begins_anew_and_gives_its_loss_once(target: Target) -> None:
    net = network(target.device)
    one, two = torch.rand(2, 4, 3, 8, 8, device=target.device).unbind()
    want = by_hand(net, two)[1]
    with BNStatisticsLoss(net) as statistics:
        net(one)  # nobody asks
        net(two)
        torch.testing.assert_close(statistics.loss(), want)
        with pytest.raises(RuntimeError, match="nothing was collected"):
            statistics.loss()


def test_the_average_counts_from_its_first_update_and_follows_its_momentum(target: Target) -> None:
    net = network(target.device)
    batches = torch.rand(4, 4, 3, 8, 8, device=target.device).unbind()
    seen = [by_hand(net, batch)[2] for batch in batches]
    statistics = BNStatisticsLoss(net, momentum=0.9)

    def loss(images: Tensor) -> Tensor:
        with statistics:
            net(images)
            return statistics.loss()

    torch.testing.assert_close(loss(batches[0]), by_hand(net, batches[0])[1])
    assert statistics.state_dict() == {"average": []}
    statistics.update_average()
    first_buffers = [t.data_ptr() for pair in statistics._average for t in pair]
    loss(batches[1])
    statistics.update_average()
    average = [
        [0.9 * a + 0.1 * b for a, b in zip(*layers, strict=True)] for layers in zip(*seen[:2], strict=True)
    ]
    for own, want in zip(statistics.state_dict()["average"], average, strict=True):
        torch.testing.assert_close(list(own), want)
    want = batches[2].new_zeros(())
    x, at = batches[2], 0
    for layer in net:  # type: ignore[attr-defined]
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            want = want + written_out(x, layer.running_mean, layer.running_var, (0.9, *average[at]))[0]
            at += 1
        x = layer(x)
    torch.testing.assert_close(loss(batches[2]), want)
    # A captured graph reads these addresses.
    assert first_buffers == [t.data_ptr() for pair in statistics._average for t in pair]


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_the_average_is_saved_and_put_back(target: Target, used: bool) -> None:
    net = network(target.device)
    images = torch.rand(4, 3, 8, 8, device=target.device)

    def loss(statistics: BNStatisticsLoss) -> Tensor:
        with statistics:
            net(images)
            return statistics.loss()

    statistics, other = (BNStatisticsLoss(net, momentum=0.5) for _ in range(2))
    with statistics:
        net(images * 0.5)
    statistics.update_average()
    state = statistics.state_dict()
    want = loss(statistics)
    statistics.update_average()  # the state is a copy
    if used:
        loss(other)
    assert not torch.allclose(loss(other), want) or not used
    other.load_state_dict(state)
    torch.testing.assert_close(loss(other), want)
    other.load_state_dict({"average": []})
    torch.testing.assert_close(loss(other), by_hand(net, images)[1])


def test_a_layer_called_twice_counts_twice(target: Target) -> None:
    layer = nn.BatchNorm1d(3).to(target.device).eval()
    x = torch.randn(6, 3, device=target.device)
    with BNStatisticsLoss(nn.Sequential(layer, layer), momentum=0.9) as statistics:
        layer(layer(x))
        first = bn_statistics_loss(x, layer.running_mean, layer.running_var).loss
        second = bn_statistics_loss(layer(x), layer.running_mean, layer.running_var).loss
        statistics._begin()
        layer(layer(x))
        torch.testing.assert_close(statistics.loss(), first + second)


X, C = torch.zeros(2, 3, 4), torch.zeros(3)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (TypeError, "x: got list", lambda: bn_statistics_loss([0.0], C, C)),  # type: ignore[arg-type]
        (TypeError, "x: got dtype", lambda: bn_statistics_loss(X.int(), C, C)),
        (ValueError, r"x: got shape \(3,\)", lambda: bn_statistics_loss(C, C, C)),
        (ValueError, "with elements", lambda: bn_statistics_loss(X[:0], C, C)),
        (TypeError, "running_mean: got float", lambda: bn_statistics_loss(X, 0.0, C)),  # type: ignore[arg-type]
        (TypeError, "running_var: got dtype", lambda: bn_statistics_loss(X, C, C.int())),
        (ValueError, r"running_mean: got shape \(2,\)", lambda: bn_statistics_loss(X, C[:2], C)),
        (ValueError, "running_var: is on meta", lambda: bn_statistics_loss(X, C, C.to("meta"))),
        (
            ValueError,
            "running_mean: requires grad",
            lambda: bn_statistics_loss(X, C.clone().requires_grad_(), C),
        ),
        (ValueError, "average_var: got None", lambda: bn_statistics_loss(X, C, C, average_mean=C)),
        (ValueError, "average_mean: got None", lambda: bn_statistics_loss(X, C, C, average_var=C)),
        (
            ValueError,
            "average_share: got 1.5",
            lambda: bn_statistics_loss(X, C, C, average_mean=C, average_var=C, average_share=1.5),
        ),
        (
            ValueError,
            r"average_share: got shape \(3,\)",
            lambda: bn_statistics_loss(X, C, C, average_mean=C, average_var=C, average_share=C),
        ),
        (ValueError, "without batch norms", lambda: BNStatisticsLoss(nn.Linear(2, 2))),
        (
            ValueError,
            "'0' keeps no running statistics",
            lambda: BNStatisticsLoss(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))),
        ),
        (ValueError, "momentum: got 1.0", lambda: BNStatisticsLoss(nn.BatchNorm1d(2), momentum=1.0)),
        (
            ValueError,
            "average: got 2 layers",
            lambda: _used().load_state_dict({"average": [(C, C), (C, C)]}),
        ),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()


def _used() -> BNStatisticsLoss:
    layer = nn.BatchNorm1d(3).eval()
    with BNStatisticsLoss(layer, momentum=0.5) as statistics:
        layer(torch.zeros(2, 3))
    return statistics


def test_what_is_returned_is_the_callers_to_change(target: Target) -> None:
    """Mean and variance share no memory with what a backward needs."""
    x = torch.randn(5, 3, 4, 4, device=target.device, requires_grad=True)
    mean, var = (torch.rand(3, device=target.device) + 0.5 for _ in range(2))
    (wanted,) = torch.autograd.grad(bn_statistics_loss(x, mean, var)[0], x)
    loss, own_mean, own_var = bn_statistics_loss(x, mean, var)
    own_mean.zero_()
    own_var.fill_(7.0)
    assert not own_mean.any()
    (found,) = torch.autograd.grad(loss, x)
    assert torch.equal(found, wanted)
