"""Kdiffusion: schedule identities, branches and their merge, every option of the loss, refusals, a miniature."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.errors import ConfigError, KDFastError
from kdfast.methods.kdiffusion import (
    Branches,
    Kdiffusion,
    KdiffusionConfig,
    Stage,
    convert,
    linear_alpha_hat,
    merge,
    reverse_coefficients,
    reverse_variances,
)
from kdfast.models import create_model
from tests.conftest import Target

U = [0.3829, 0.4233, 0.4664, 0.5089, 0.5428, 0.5543, 0.5262, 0.4381, 0.2589, 0.0]
V = [0.0142, 0.0321, 0.0652, 0.1184, 0.1930, 0.2864, 0.3972, 0.5360, 0.7369, 1.0]


def test_the_published_vector() -> None:
    u, v = reverse_coefficients(linear_alpha_hat(), 10)
    torch.testing.assert_close(u, torch.tensor(U, dtype=torch.float64), rtol=0, atol=6e-5)
    torch.testing.assert_close(v, torch.tensor(V, dtype=torch.float64), rtol=0, atol=6e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.5, 0.999), min_size=1, max_size=30), st.integers(1, 30))
def test_identities_of_any_schedule(alphas: list[float], m: int) -> None:
    alpha_hat = torch.tensor(alphas, dtype=torch.float64).cumprod(0)
    n = len(alphas)
    m = min(m, n)
    u, v = reverse_coefficients(alpha_hat, m)
    w = reverse_variances(alpha_hat, m)
    padded = torch.cat([torch.ones(1, dtype=torch.float64), alpha_hat])
    ends = [int(n * (m - k) / m + 0.5) for k in range(m + 1)]
    high, low = padded[ends[:-1]], padded[ends[1:]]
    torch.testing.assert_close(u * high + v, low, rtol=0, atol=1e-12)
    torch.testing.assert_close(w + u**2 * (1 - high**2), 1 - low**2, rtol=0, atol=1e-12)
    assert (float(u[-1]), float(v[-1]), float(w[-1])) == (0.0, 1.0, 0.0)


def test_the_posterior_is_the_product_of_gaussians() -> None:
    """q(x_lo | x_hi, x0) ∝ q(x_hi | x_lo)·q(x_lo | x0), by brute force on a grid."""
    alpha_hat = torch.tensor([0.8, 0.5], dtype=torch.float64)
    u, v = reverse_coefficients(alpha_hat, 2)
    w = reverse_variances(alpha_hat, 2)
    x0, x_high, a = 0.7, -0.4, 0.5 / 0.8
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    log = -((x_high - a * x) ** 2) / (2 * (1 - a * a)) - (x - 0.8 * x0) ** 2 / (2 * (1 - 0.64))
    weight = log.softmax(0)
    mean = (weight * x).sum()
    torch.testing.assert_close(mean, u[0] * x_high + v[0] * x0, rtol=0, atol=1e-9)
    torch.testing.assert_close((weight * (x - mean) ** 2).sum(), w[0], rtol=0, atol=1e-8)


# --- branches ------------------------------------------------------------------------------------------------


def warmed(op: nn.Module, norm: nn.Module | None, x: Tensor, m: int = 3) -> Branches:
    """Branches with statistics, gains and offsets that all differ."""
    branches = Branches(op, norm, m).double()
    if branches.norm is not None:
        nn.init.uniform_(branches.norm.weight, 0.5, 1.5)
        nn.init.normal_(branches.norm.bias)
    for _ in range(3):
        branches(x * 2 + 1)
    return branches.eval()


LAYERS = [
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    (nn.Conv2d(4, 6, 1, groups=2), nn.BatchNorm2d(6), (2, 4, 3, 3)),
    (nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), (2, 4, 3, 3)),
    (nn.Linear(5, 3), nn.BatchNorm1d(3), (4, 5)),
    (nn.Linear(5, 3, bias=False), None, (4, 5)),
]


@pytest.mark.parametrize(("op", "norm", "shape"), LAYERS)
def test_branches_are_m_separate_layers(op: Any, norm: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    branches = Branches(op, norm, 3).double()
    out = branches(x)
    assert branches.stacked is not None
    weights = branches._by_branch(branches.op.weight).flatten(1, 2)
    torch.testing.assert_close(weights[0], op.weight.double())
    for j in range(3):
        one = copy.deepcopy(op).double()
        one.weight.data.copy_(weights[j])
        alone = one(x) if norm is None else copy.deepcopy(norm).double().train()(one(x))
        torch.testing.assert_close(branches.stacked[j], alone, rtol=1e-10, atol=1e-10)
        assert j == 0 or not torch.allclose(weights[j], weights[0])
    torch.testing.assert_close(out, branches.stacked.mean(0))


@pytest.mark.parametrize(("op", "norm", "shape"), LAYERS)
def test_merged_is_the_mean_of_the_branches(op: Any, norm: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    branches = warmed(op, norm, x)
    plain = merge(branches)
    assert type(plain) is type(op)
    torch.testing.assert_close(plain(x), branches(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merge(branches.float())(x.float()), branches(x.float()), rtol=1e-5, atol=1e-5)


def test_a_merged_model_has_the_keys_that_it_had() -> None:
    model = create_model("resnet8", 10)
    keys = list(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    convert(model, "layer3.0.conv2", "layer3.0.bn2", m=3)
    assert list(model.state_dict()) != keys
    for _ in range(2):
        model(x)
    before = model.eval()(x)
    assert merge(model) is model
    assert sorted(model.state_dict()) == sorted(keys)
    plain = create_model("resnet8", 10)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.eval()(x), before, rtol=1e-5, atol=1e-5)


def test_a_norm_without_affine_still_carries_the_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)).double()
    keys = list(model.state_dict())
    convert(model, "0", "1", m=2)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64) + 1
    model(x)
    before = model.eval()(x)
    with pytest.warns(UserWarning, match="affine=False"):
        merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    assert list(model.state_dict()) == keys


# --- the loss ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two stages and a classifier; ``tokens`` puts the second stage's output out as [B, N, C]."""

    def __init__(self, width: int, *, tokens: bool = False, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
        self.last, self.fc, self.tokens = nn.Identity(), nn.Linear(width, 5), tokens

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.tokens:
            return self.fc(self.last(x.flatten(2).transpose(1, 2)).mean(1))
        return self.fc(self.last(x).mean((2, 3)))


IMAGES, LABELS = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 3])
LAST = Stage("conv2", "last", "bn2")
FIRST = Stage("conv1", "bn1", "bn1")


def frozen(teacher: nn.Module) -> nn.Module:
    return teacher.eval().requires_grad_(False)


def method(*stages: Stage, teacher: Any = None, student: Any = None, **fields: Any) -> Kdiffusion:
    torch.manual_seed(1)
    config = replace(KdiffusionConfig(branches=3), **fields)
    own, other = student or Net(4), frozen(teacher or Net(6))
    return Kdiffusion(own, other, stages=stages or (LAST,), images=IMAGES, config=config)


def values(method: Kdiffusion) -> tuple[Tensor, Tensor]:
    """Loss and the gradient of the branches' weights, from one state of the generator."""
    torch.manual_seed(2)
    loss = method.step((IMAGES, LABELS))
    branches = method._branches[0]
    return loss.detach(), torch.autograd.grad(loss, branches.op.weight)[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 0.5},
        {"beta": 0.0},
        {"objective": "average"},
        {"trajectory": "sampled"},
        {"shuffle": False},
        {"estimate": "last"},
        {"beta_end": 0.01},
        {"steps": 100},
        {"branches": 2},
    ],
    ids=str,
)
def test_every_option_changes_the_loss(fields: dict[str, Any]) -> None:
    assert not torch.allclose(values(method())[0], values(method(**fields))[0])


def test_sigma_changes_a_sampled_trajectory_only() -> None:
    sampled = [values(method(trajectory="sampled", sigma=s))[0] for s in (1.0, 0.1)]
    chain = [values(method(sigma=s))[0] for s in (1.0, 0.1)]
    assert not torch.equal(*sampled)
    assert torch.equal(*chain)


def test_carry_gradient_changes_the_gradient_and_not_the_loss() -> None:
    (loss, grad), (other, other_grad) = values(method()), values(method(carry_gradient=False))
    assert torch.equal(loss, other)
    assert not torch.allclose(grad, other_grad)


@pytest.mark.parametrize("estimate", ["mean", "last"])
def test_the_loss_is_the_papers_written_out(estimate: Any) -> None:
    """Chain, no shuffle, no bridge: cross-entropy, T and P, and the guided loss from their definitions."""
    made = method(student=Net(6), bridge=False, shuffle=False, alpha=0.7, beta=0.3, estimate=estimate)
    loss = made.step((IMAGES, LABELS))
    made.teacher(IMAGES)
    x0 = made._target(LAST)
    logits = made.student(IMAGES)
    s = made._branches[0].stacked
    assert s is not None
    u, v = reverse_coefficients(linear_alpha_hat(), 3)
    t = p = torch.randn_like(x0)
    middle = torch.zeros(())
    for k in range(3):
        t, p = u[k] * t + v[k] * x0, u[k] * p + v[k] * s[k]
        middle = middle + F.mse_loss(p, t)
    weight = made.teacher.fc.weight
    guess = s.mean(0) if estimate == "mean" else p
    guided = ((guess.mean((2, 3)) - x0.mean((2, 3))) @ weight.T).square().mean()
    want = F.cross_entropy(logits, LABELS) + 0.7 * middle + 0.3 * guided
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.parts["guided"], guided.detach())


def test_a_stage_is_one_launch_forward_and_one_backward(target: Target) -> None:
    if target.device != "cpu":
        pytest.skip("the networks of this file are on the CPU")
    made = method(FIRST, LAST)
    torch.manual_seed(2)
    if target.backend == "reference":
        made.step((IMAGES, LABELS)).backward()
        return
    from kdfast import use_backend
    from kdfast.kernels.launch import count_launches

    with count_launches() as counts:
        loss = made.step((IMAGES, LABELS))
        (grad,) = torch.autograd.grad(loss, made._branches[0].op.weight)
    assert counts == {"reparam_middle_kernel": 4}
    with use_backend("reference"):
        want, want_grad = values(method(FIRST, LAST))
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-6)


def test_gradients_reach_student_and_bridges_and_nothing_else() -> None:
    made = method(FIRST, LAST)
    made.step((IMAGES, LABELS)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.bridges.parameters())
    assert all(p.grad is not None for p in made.student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())
    assert not any(key.startswith("_teacher") or "teacher" in key for key in made.state_dict())


def test_two_stages_add_up() -> None:
    single, multi = method(LAST, shuffle=False), method(FIRST, LAST, shuffle=False)
    values(single), values(multi)
    assert multi.parts["middle"] > single.parts["middle"] * 1.01


def test_taps_of_tokens_and_of_other_sizes() -> None:
    for teacher, layout in ((Net(6, tokens=True), "channels_last"), (Net(6, stride=2), "channels_first")):
        made = method(teacher=teacher, teacher_layout=layout)
        made.step((IMAGES, LABELS)).backward()
        assert made.parts["middle"] > 0


def test_your_own_loop_may_leave_the_task_loss_out() -> None:
    made = method()
    with torch.no_grad():
        made.teacher(IMAGES)
    made(made.student(IMAGES)).backward()
    assert made.parts["task"] == 0
    assert made.parts["middle"] > 0


def test_activations_are_let_go_of() -> None:
    made = method()
    made.step((IMAGES, LABELS))
    assert made._branches[0].stacked is None
    with pytest.raises(KDFastError, match="has not run yet"):
        made(torch.zeros(4, 5), LABELS)


def test_an_optimizer_without_the_bridges_is_noticed() -> None:
    made = method()
    assert made.check_optimizer(torch.optim.SGD(made.parameters(), 0.1)) == []
    with pytest.warns(UserWarning, match="lacks 3 parameters"):
        missing = made.check_optimizer(torch.optim.SGD(made.student.parameters(), 0.1))
    assert all(name.startswith("bridges.") for name in missing)


def test_the_exported_student_has_nothing_of_the_method() -> None:
    student = Net(4)
    keys = sorted(student.state_dict())
    made = method(FIRST, LAST, student=student)
    for _ in range(2):
        made.step((IMAGES, LABELS)).backward()
    before = student.eval()(IMAGES)
    assert sorted(merge(student).state_dict()) == keys
    torch.testing.assert_close(student(IMAGES), before, rtol=1e-5, atol=1e-5)


A = linear_alpha_hat(10)
NOT_A_CLASSIFIER = nn.Sequential(OrderedDict(last=nn.Identity()))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "m: got 0", lambda: reverse_coefficients(A, 0)),
        (ValueError, "m: got 11", lambda: reverse_coefficients(A, 11)),
        (TypeError, "m: got float", lambda: reverse_coefficients(A, 2.0)),  # type: ignore[arg-type]
        (TypeError, "alpha_hat: got list", lambda: reverse_coefficients([0.5], 1)),  # type: ignore[arg-type]
        (ValueError, "alpha_hat: got shape", lambda: reverse_coefficients(A[None], 1)),
        (ValueError, "strictly decreasing", lambda: reverse_coefficients(A.flip(0), 1)),
        (ValueError, "strictly decreasing", lambda: reverse_coefficients(-A, 1)),
        (ValueError, "steps: got 0", lambda: linear_alpha_hat(0)),
        (ValueError, "beta_start, beta_end", lambda: linear_alpha_hat(5, 0.5, 0.1)),
        (ConfigError, "branches: got 0", lambda: KdiffusionConfig(branches=0)),
        (ConfigError, "alpha: got -1", lambda: KdiffusionConfig(alpha=-1)),
        (ConfigError, "objective: got 'kl'", lambda: KdiffusionConfig(objective="kl")),  # type: ignore[arg-type]
        (ConfigError, "beta_start", lambda: KdiffusionConfig(beta_start=2.0)),
        (ValueError, "m: got 0", lambda: Branches(nn.Linear(2, 2), None, 0)),
        (TypeError, "op: got ReLU", lambda: Branches(nn.ReLU(), None, 2)),
        (TypeError, "norm: got LayerNorm", lambda: Branches(nn.Linear(2, 2), nn.LayerNorm(2), 2)),
        (ValueError, "norm: has 3", lambda: Branches(nn.Linear(2, 2), nn.BatchNorm1d(3), 2)),
        (
            ValueError,
            "no running statistics",
            lambda: Branches(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False), 2),
        ),
        (
            ValueError,
            "needs at least 2",
            lambda: Branches(nn.Linear(2, 2), nn.BatchNorm1d(2), 1)(torch.zeros(1, 2)),
        ),
        (ValueError, "without branches", lambda: merge(nn.ReLU())),
        (ValueError, "did you mean conv", lambda: convert(Net(4), "conv3")),
        (
            ValueError,
            "stages: got none",
            lambda: Kdiffusion(Net(4), frozen(Net(4)), stages=[], images=IMAGES),
        ),
        (ValueError, "did you mean", lambda: method(Stage("conv2", "lust"))),
        (ValueError, "must match with bridge=False", lambda: method(bridge=False)),
        (ValueError, "classifier: got NoneType", lambda: method(teacher=NOT_A_CLASSIFIER)),
        (ValueError, "classifier: takes 6", lambda: method(teacher=Wide(6))),
        (ValueError, "form a square", lambda: method(teacher=Row(6), teacher_layout="channels_last")),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()


class Wide(Net):
    """The tapped layer is not what the classifier reads."""

    def forward(self, x: Tensor) -> Tensor:
        self.last(torch.cat([x, x, x], 1))
        return super().forward(x) if x.shape[1] == 6 else self.fc(x.mean((2, 3)).repeat(1, 2))


class Row(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.last(x.new_zeros(x.shape[0], 7, 6))
        return x.new_zeros(x.shape[0], 5)


def test_different_batches_are_refused() -> None:
    made = method()
    with torch.no_grad():
        made.teacher(IMAGES[:2])
    with pytest.raises(ValueError, match="4 samples went through the student, 2"):
        made(made.student(IMAGES), LABELS)


@pytest.mark.parametrize(
    ("stages", "fields", "teacher"),
    [
        ((FIRST, Stage("conv3", "last")), {}, Net(6)),  # the second layer does not exist
        ((FIRST, LAST), {"bridge": False}, Net(6)),  # channels differ
        ((FIRST, LAST), {}, NOT_A_CLASSIFIER),
        ((LAST,), {}, Wide(6)),  # found out after both networks ran
    ],
)
def test_a_failed_construction_leaves_both_networks_as_they_were(
    stages: Any, fields: dict[str, Any], teacher: nn.Module
) -> None:
    student = Net(4)
    student.conv1.eval()
    before = [(name, module, module.training) for name, module in student.named_modules()]
    state = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"."):
        method(*stages, student=student, teacher=teacher, **fields)
    assert [(name, module, module.training) for name, module in student.named_modules()] == before
    torch.testing.assert_close(student.state_dict(), state, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in teacher.modules())
    method(student=student)  # and it can be used for another try


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: dropout and activation run in the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


def test_the_activation_of_a_norm_comes_after_the_mean() -> None:
    """Branches end before the activation, the network goes on behind it, and merging gives the layer back."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), BatchNormAct2d(4)).double()
    keys = list(model.state_dict())
    branches = convert(model, "0", "1", m=3)
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    out = model(x)
    assert branches.stacked is not None
    torch.testing.assert_close(out, F.hardswish(branches.stacked.mean(0)))
    assert (branches.stacked < 0).any()
    before = model.eval()(x)
    torch.testing.assert_close(merge(model)(x), before, rtol=1e-10, atol=1e-10)
    assert list(model.state_dict()) == keys
    assert type(model[1]) is BatchNormAct2d


def test_with_nothing_to_compare_the_teacher_does_not_run() -> None:
    made = method(alpha=0.0, beta=0.0)
    made.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    loss = made.step((IMAGES, LABELS))
    torch.testing.assert_close(loss, F.cross_entropy(made.student(IMAGES), LABELS))
    assert made.parts["middle"] == made.parts["guided"] == 0


def test_exporting_leaves_what_is_trained_alone() -> None:
    made = method(FIRST, LAST)
    made.step((IMAGES, LABELS))
    exported = made.export()
    assert not exported.training
    assert made.student.training
    assert sorted(exported.state_dict()) == sorted(Net(4).state_dict())
    assert isinstance(made.student.conv2, Branches)
    torch.testing.assert_close(exported(IMAGES), made.student.eval()(IMAGES), rtol=1e-5, atol=1e-5)
    # Two further branches of 3→4 and of 4→4 with their norms; bridges 4→6 with theirs.
    assert made.extra_parameters == 2 * (12 + 8) + 2 * (16 + 8) + 2 * (24 + 12)


def test_maps_show_every_stage_and_change_nothing() -> None:
    made = method(FIRST, LAST)
    state = copy.deepcopy(made.state_dict())
    maps = made.maps(IMAGES)
    assert {name: tuple(map(lambda t: tuple(t.shape), pair)) for name, pair in maps.items()} == {
        "conv1": ((3, 4, 6, 4, 4), (4, 6, 4, 4)),
        "conv2": ((3, 4, 6, 4, 4), (4, 6, 4, 4)),
    }
    torch.testing.assert_close(made.state_dict(), state, rtol=0, atol=0)
    assert made.training
