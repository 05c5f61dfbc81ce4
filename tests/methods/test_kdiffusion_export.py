"""The student that Kdiffusion exports: trained on, frozen in part, made of a pretrained one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdfast.errors import ConfigError
from kdfast.methods.kdiffusion import Branches, Kdiffusion, KdiffusionConfig, Stage, convert, merge


class Net(nn.Module):
    """Two convolutions with batch norms of one width, and a classifier."""

    def __init__(self, width: int = 8, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), norm(width)
        self.fc = nn.Linear(width, 5)

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        out: Tensor = self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))
        return out


IMAGES = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(5, (64,), generator=torch.Generator().manual_seed(1))


STAGE = Stage("conv2", "bn2", "bn2")


def made(student: nn.Module, stage: Stage = STAGE, **fields: Any) -> Kdiffusion:
    teacher = Net(6).eval().requires_grad_(False)
    config = KdiffusionConfig(**{"branches": 4, **fields})
    return Kdiffusion(student, teacher, stages=[stage], images=IMAGES, config=config)


def trained(student: nn.Module, steps: int = 60, **fields: Any) -> Kdiffusion:
    method = made(student, **fields)
    optimizer = torch.optim.SGD(method.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        method.step((IMAGES, LABELS)).backward()
        optimizer.step()
    with torch.no_grad():  # let the running statistics catch up with the weights
        for _ in range(60):
            method.student(IMAGES)
    return method


def test_an_exported_student_computes_in_training_mode_what_it_does_in_evaluation_mode() -> None:
    method = trained(Net())
    exported = method.export()
    before = exported(IMAGES)
    torch.testing.assert_close(before, method.student.eval()(IMAGES), rtol=1e-5, atol=1e-5)
    exported.train()
    with torch.no_grad():
        inside = exported(IMAGES)
        for _ in range(50):
            exported(IMAGES)
    # The batch is the one that the statistics are of, so only biased against unbiased variances differ.
    torch.testing.assert_close(inside, before, rtol=0.02, atol=0.02)
    torch.testing.assert_close(exported.eval()(IMAGES), before, rtol=0.02, atol=0.02)


def test_an_exported_norm_holds_the_statistics_of_its_input() -> None:
    exported = trained(Net()).export()
    seen: list[Tensor] = []
    exported.bn2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    exported(IMAGES)
    var, mean = torch.var_mean(seen[0], (0, 2, 3))
    torch.testing.assert_close(exported.bn2.running_mean, mean, rtol=0.01, atol=0.01)
    torch.testing.assert_close(exported.bn2.running_var, var, rtol=0.02, atol=1e-3)
    assert exported.bn2.num_batches_tracked > 0


def test_the_statistics_of_the_mean_are_saved_and_follow_a_cumulative_average() -> None:
    norm = nn.BatchNorm2d(8, momentum=None)
    branches = Branches(nn.Conv2d(3, 8, 1), norm, 3)
    seen = []
    for scale in (1.0, 3.0):
        seen.append(branches(IMAGES * scale + scale).detach().var((0, 2, 3)))
    torch.testing.assert_close(branches.state_dict()["mean_var"], torch.stack(seen).mean(0))
    kept = branches.mean_var.clone()
    branches.eval()(IMAGES)
    torch.testing.assert_close(branches.mean_var, kept)


def test_a_norm_without_affine_cannot_hold_a_scale_and_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)).double()
    convert(model, "0", "1", m=2)
    model(IMAGES.double())
    with pytest.warns(UserWarning, match=r"'1' has no weight.*evaluation mode alone"):
        merge(model)


# --- frozen norms --------------------------------------------------------------------------------------------


def test_a_frozen_norm_stays_frozen_through_conversion_training_and_merge() -> None:
    student = Net()
    student.bn2.eval()
    method = made(student)
    branches = method._branches[0]
    assert branches.norm is not None
    assert branches.training
    assert not branches.norm.training
    running = branches.norm.running_mean.clone()
    method.step((IMAGES, LABELS)).backward()
    torch.testing.assert_close(branches.norm.running_mean, running)
    merged = merge(student)
    assert not merged.bn2.training
    assert merged.bn1.training


# --- where branches begin ------------------------------------------------------------------------------------


def test_branches_that_are_copies_leave_a_pretrained_student_as_it_is() -> None:
    student = trained(Net(), steps=5).export()
    before = student(IMAGES)
    method = made(copy.deepcopy(student), init="copies")
    torch.testing.assert_close(method.student.eval()(IMAGES), before, rtol=1e-5, atol=1e-5)
    random = made(copy.deepcopy(student), init="random")
    assert not torch.allclose(random.student.eval()(IMAGES), before, rtol=0.05, atol=0.05)
    # Each takes another step of the process, so that they part by themselves.
    method.train()
    method.step((IMAGES, LABELS)).backward()
    gradient = method._branches[0]._by_branch(method._branches[0].op.weight.grad)
    assert not torch.allclose(gradient[0], gradient[1])


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="init: got 'zeros', accepted: random, copies"):
        KdiffusionConfig(init="zeros")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init: got 'zeros'"):
        Branches(nn.Linear(2, 2), None, 2, init="zeros")  # type: ignore[arg-type]


# --- the norm after the layer ----------------------------------------------------------------------------------


def test_a_norm_that_does_not_follow_its_layer_is_refused_by_name() -> None:
    student = Net()
    before = {name: id(module) for name, module in student.named_modules()}
    with pytest.raises(ValueError, match=r"norm: 'bn1' does not run on the output of 'conv2'; 'bn2' does"):
        made(student, Stage("conv2", "bn2", "bn1"))
    assert {name: id(module) for name, module in student.named_modules()} == before


def test_a_layer_whose_output_no_norm_takes_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"norm: 'bn1' does not run on the output of 'fc'; no batch norm does"
    ):
        made(Net(5), Stage("fc", "fc", "bn1"), beta=0.0)


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        out: Tensor = self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))
        return out


def test_a_layer_that_runs_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"op: 'conv2' runs 2 times in a pass"):
        made(Twice())


def test_a_linear_layer_on_tokens_is_refused_in_words() -> None:
    with pytest.raises(
        ValueError, match=r"x: got shape \(2, 7, 4\); branches of nn.Linear take \[B, features\]"
    ):
        Branches(nn.Linear(4, 3), None, 2)(torch.zeros(2, 7, 4))
