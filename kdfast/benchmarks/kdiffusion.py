"""Kdiffusion's whole training step: as a competent person would write it without kdfast, and kdfast's.

The eager version has m pairs of convolution and batch norm in a module list, runs each, bridges each, and walks the
recursion in Python. Both hold the same numbers and take the branches in order, so that their losses and gradients can
be compared. kdfast's has one wide convolution and one wide batch norm, and its middle loss is one kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.benchmarks.case import Case, Provider, Settings, Work, compiled
from kdfast.methods.kdiffusion import Kdiffusion, KdiffusionConfig, Stage
from kdfast.models import create_model


class EagerBranches(nn.Module):
    """m convolutions and batch norms side by side; their mean goes on."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.ops, self.norms = nn.ModuleList(), nn.ModuleList()
        for j in range(source.m):
            rows = slice(j * source.channels, (j + 1) * source.channels)
            wide, norm = source.op, source.norm
            op = nn.Conv2d(
                wide.in_channels, source.channels, wide.kernel_size, wide.stride, wide.padding, bias=False
            )
            op.weight.data.copy_(wide.weight[rows])
            self.ops.append(op)
            one = nn.BatchNorm2d(source.channels)
            one.weight.data.copy_(norm.weight[rows])
            one.bias.data.copy_(norm.bias[rows])
            self.norms.append(one)
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the branches."""
        self.features = [norm(op(x)) for op, norm in zip(self.ops, self.norms, strict=True)]
        return torch.stack(self.features).mean(0)


class EagerKdiffusion(nn.Module):
    """Cross-entropy, the middle loss and the guided loss of one stage, written out; all weights 1."""

    def __init__(self, method: Kdiffusion, layer: str, norm: str, tap: str) -> None:
        super().__init__()
        self.student = copy.deepcopy(method.student)
        self.branches = EagerBranches(method.student.get_submodule(layer)).to(method.get_buffer("u").device)
        self.student.set_submodule(layer, self.branches)
        self.student.set_submodule(norm, nn.Identity())
        self.bridge = copy.deepcopy(method.bridges[0])
        self._teacher = (method.teacher,)
        self._target: list[Tensor] = []
        module: nn.Module = method.teacher.get_submodule(tap)
        module.register_forward_hook(lambda _, __, out: self._target.append(out))
        self.u, self.v = method.get_buffer("u").tolist(), method.get_buffer("v").tolist()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        self._target.clear()
        teacher: Any = self._teacher[0]
        with torch.no_grad():
            teacher(images)
        x0 = self._target.pop()
        task = F.cross_entropy(self.student(images), labels)
        m = len(self.branches.features)
        # One call: a bridge's batch norm sees all branches together, as the method defines it.
        bridged = list(self.bridge(torch.cat(self.branches.features)).chunk(m))
        target = state = x0
        middle = torch.zeros_like(task)
        for u, v, branch in zip(self.u, self.v, bridged, strict=True):
            target = u * target + v * x0
            state = u * state + v * branch
            middle = middle + F.mse_loss(state, target)
        gap = torch.stack(bridged).mean(0) - x0
        guided = F.linear(gap.flatten(2).mean(2), teacher.get_classifier().weight).square().mean()
        return task + middle + guided


def cases(settings: Settings) -> Iterator[Case]:
    """The training step of one pair of networks, the last stage in ten branches."""
    teacher, student = settings.pick(
        ("resnet8", "resnet8"), ("resnet14", "resnet8"), ("resnet32x4", "resnet8x4")
    )
    batch, side, branches = settings.pick((4, 8, 2), (32, 16, 10), (128, 32, 10))
    if settings.device == "cuda":
        teacher, student, batch, side = "resnet32x4", "resnet8x4", 128, 32
    yield _case(teacher, student, batch, side, branches, settings)


def _case(teacher: str, student: str, batch: int, side: int, branches: int, settings: Settings) -> Case:
    layer, norm, tap = "layer3.0.conv2", "layer3.0.bn2", "layer3"
    made: dict[str, Any] = {}

    def prepared() -> dict[str, Any]:
        if not made:
            torch.manual_seed(0)
            learner, master = (create_model(name, 100).to(settings.device) for name in (student, teacher))
            master.eval().requires_grad_(False)
            images = torch.randn(batch, 3, side, side, device=settings.device)
            config = KdiffusionConfig(branches=branches, shuffle=False)
            ours = Kdiffusion(learner, master, stages=[Stage(layer, tap, norm)], images=images, config=config)
            made["ours"], made["eager"] = ours, EagerKdiffusion(ours, layer, norm, tap).train()
            made["batch"] = (images, torch.randint(100, (batch,), device=settings.device))
        return made

    def work(loss: Any, parameters: list[nn.Parameter]) -> Work:
        images, labels = prepared()["batch"]

        def step(_: int) -> tuple[Tensor, Tensor]:
            value = loss(images, labels)
            grads = torch.autograd.grad(value, parameters)
            return value.detach(), grads[0]  # of the student's first layer

        return step

    def eager() -> Work:
        module = prepared()["eager"]
        return work(module, list(module.parameters()))

    def traced() -> Work:
        module = prepared()["eager"]
        return work(compiled(module), list(module.parameters()))

    def ours() -> Work:
        method = prepared()["ours"].train()
        return work(lambda *images: method.step(images), list(method.parameters()))

    def check(_: str, result: tuple[Tensor, Tensor]) -> None:
        want = work(prepared()["eager"], list(prepared()["eager"].parameters()))(0)
        torch.testing.assert_close(result[0], want[0], rtol=1e-4, atol=1e-5)
        error = float((result[1] - want[1]).norm() / want[1].norm())
        assert error < 1e-2, f"the first layer's gradient is off by {error:.2e} of its norm"

    providers = (Provider("eager", eager), Provider("torch.compile", traced), Provider("kdfast", ours))
    params = {"teacher": teacher, "student": student, "m": branches, "batch": batch, "image": side}
    return Case("kdiffusion", "training step", params, 1, providers, check, batch, "images")
