"""What is captured on CUDA runs eagerly here; the bookkeeping around a graph is tested with one that only calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kdfast.methods.ssdkd import capture, inversion
from kdfast.methods.ssdkd import method as method_module
from tests.support.ssdkd import method, run


class CallingGraph:
    """Replays a function by calling it, into the same memory each time, as a CUDA graph would."""

    made = 0

    def __init__(self, body: Callable[[], Any], rng: torch.Generator) -> None:
        type(self).made += 1
        self.body, self.result, self.replays = body, None, 0

    def replay(self) -> Any:
        with torch.enable_grad():  # a real graph was recorded with gradients on
            fresh = self.body()
        if self.result is None:
            self.result = fresh
        elif fresh is not None:
            loss, gradients = fresh
            self.result[0].copy_(loss)
            for kept, new in zip(self.result[1], gradients):
                kept.copy_(new)
        self.replays += 1
        return self.result


@pytest.fixture
def calling(monkeypatch: pytest.MonkeyPatch) -> type[CallingGraph]:
    CallingGraph.made = 0
    monkeypatch.setattr(capture, "_Graph", CallingGraph)
    for module in (capture, inversion, method_module):
        monkeypatch.setattr(module, "capturable", lambda device, wanted=True: wanted)
    # torch refuses a capturable Adam on the CPU.
    plain = inversion._adam
    monkeypatch.setattr(inversion, "_adam", lambda groups, rate, capture: plain(groups, rate, False))
    return CallingGraph


def test_a_captured_run_is_the_eager_one(calling: type[CallingGraph]) -> None:
    captured = method()
    eager = method(cuda_graphs=False)
    assert torch.equal(run(captured, 6), run(eager, 6))
    for ours, theirs in zip(captured.student.parameters(), eager.student.parameters()):
        assert torch.equal(ours, theirs)
    # One for inversion (the first rounds are real calls) and one for the distillation step.
    assert calling.made == 2


@pytest.mark.parametrize("captured", [False, True])
def test_an_update_is_a_step_its_gradients_and_the_optimisers(
    calling: type[CallingGraph], monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    monkeypatch.setattr(method_module, "optimizer_capturable", lambda optimizer: captured)
    one, other = method(cuda_graphs=captured), method(cuda_graphs=False)
    optimizers = [torch.optim.SGD(made.student.parameters(), lr=0.05, momentum=0.9) for made in (one, other)]
    for made in (one, other):
        made.synthesize()
        made.synthesize()
    for _ in range(6):
        got = one.update(optimizers[0]).clone()
        loss = other.step()
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert torch.equal(got, loss.detach())
    for ours, theirs in zip(one.student.parameters(), other.student.parameters()):
        assert torch.equal(ours, theirs)
    assert calling.made == 2 * int(captured)  # inversion has its own


def test_which_optimisers_are_captured() -> None:
    weights = [nn.Parameter(torch.ones(2))]
    rate = torch.tensor(0.1)
    assert capture.optimizer_capturable(torch.optim.SGD(weights, lr=rate, fused=True))
    assert not capture.optimizer_capturable(torch.optim.SGD(weights, lr=0.1, fused=True))
    assert not capture.optimizer_capturable(torch.optim.SGD(weights, lr=0.1))
    capturable = torch.optim.Adam(weights, lr=rate, capturable=True)
    assert capture.optimizer_capturable(capturable)
    capturable.param_groups[0]["lr"] = 0.1  # a number that a schedule replaces: a graph would keep the first
    assert not capture.optimizer_capturable(capturable)
    assert not capture.optimizer_capturable(torch.optim.AdamW(weights, lr=0.1))


def test_gradients_that_are_ready_are_scaled_and_not_overwritten(calling: type[CallingGraph]) -> None:
    layer = nn.Linear(2, 1, bias=False)
    idle = nn.Parameter(torch.ones(1))
    inputs = iter(torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8], [9, 10]]))
    loss = capture.CapturedLoss(
        lambda: layer(next(inputs)).sum(), [*layer.parameters()], torch.Generator(), capture=True
    )
    for _ in range(3):
        loss()
    first = loss()
    kept = float(first.detach())
    (3 * first).backward(retain_graph=True)
    assert torch.equal(layer.weight.grad, torch.tensor([[21.0, 24]]))
    second = loss()
    assert float(first.detach()) == kept != float(second.detach())
    assert idle.grad is None
    with pytest.raises(RuntimeError, match=r"before the next step\(\)"):
        first.backward()  # whose gradients are the second's by now
    second.backward()


def test_parameters_that_take_no_part_get_no_gradient() -> None:
    used, idle = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    out = capture.ReadyGradients.apply(
        lambda: (torch.ones(()), (torch.tensor([2.0]), None)), lambda: 0, used, idle
    )
    (out * 5).backward()
    assert torch.equal(used.grad, torch.tensor([10.0]))
    assert idle.grad is None


def test_what_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not capture.capturable(cpu)
    assert capture.capturable(cuda)
    assert not capture.capturable(cuda, wanted=False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert capture.capturable(cuda)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    assert not capture.capturable(cuda)


def assigned(student: nn.Module) -> None:
    student.load_state_dict({name: 0.5 * value for name, value in student.state_dict().items()}, assign=True)


def doubled(student: nn.Module) -> None:
    linear = [part for part in student.modules() if isinstance(part, nn.Linear)][-1]
    linear.register_forward_hook(lambda module, given, out: 2 * out)


def replaced(student: nn.Module) -> None:
    name = [name for name, part in student.named_modules() if isinstance(part, nn.Linear)][-1]
    before = student.get_submodule(name)
    student.set_submodule(name, nn.Linear(before.in_features, before.out_features))


def frozen(student: nn.Module) -> None:
    next(student.parameters()).requires_grad_(False)


@pytest.mark.parametrize("change", [assigned, doubled, replaced, frozen])
@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("updating", [False, True])
def test_a_network_that_has_changed_is_recorded_anew(
    change: Callable[[nn.Module], None], which: str, updating: bool, calling: type[CallingGraph]
) -> None:
    """Weights at other addresses, another layer, a hook, a layer that is frozen: a replay would know of none."""
    if (change, which) == (frozen, "teacher"):
        pytest.skip("it is")
    made = method()
    made.synthesize()
    optimizer = torch.optim.SGD(made.student.parameters(), lr=torch.tensor(0.01), fused=True)

    def recorded() -> int:
        before = CallingGraph.made
        for _ in range(capture.WARM_UP + 2):
            made.update(optimizer) if updating else made.step().backward()
        return CallingGraph.made - before

    assert recorded() == 1
    assert recorded() == 0
    change(getattr(made, which))
    if which == "teacher":
        made.teacher.requires_grad_(False)
    assert recorded() == 1
    assert len(made._losses) + len(made._updates) == 1
