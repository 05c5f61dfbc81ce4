"""Which network is the student and which the teacher: one rule of every method, one sentence a refusal."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdfast import methods
from kdfast.adapters import Distiller, TrainerLoss
from kdfast.methods.diffkd import DiffKDConfig
from kdfast.methods.kdiffusion import Stage
from kdfast.models.roles import check_networks, chosen_student
from kdfast.nn import KDLoss
from tests.support.ssdkd import SHAPE, TINY


class Net(nn.Module):
    """Enough of a network for every method."""

    stages = ("conv",)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(self.conv(x)).mean((2, 3)))
        return out

    def get_classifier(self) -> nn.Linear:
        return self.fc


IMAGES = torch.zeros(2, 3, 8, 8)
STAGES = [Stage("conv", "norm", "norm")]
MADE: dict[str, Callable[[Any, Any], Any]] = {
    "DMKD": methods.DMKD,
    "SurrogateKD": methods.SurrogateKD,
    "SSDKD": lambda s, t: methods.SSDKD(s, t, config=methods.SSDKDConfig(**TINY), image_shape=SHAPE),
    "DiffKD": lambda s, t: methods.DiffKD(s, t, config=DiffKDConfig(latent_channels=4), images=IMAGES),
    "Kdiffusion": lambda s, t: methods.Kdiffusion(s, t, stages=STAGES, images=IMAGES),
    "Distiller": lambda s, t: Distiller(s, t, loss=KDLoss()),
    **{
        name: lambda s, t, name=name: getattr(methods, name)(s, t, images=IMAGES)
        for name in ("AT", "DIST", "DKD", "FitNet", "KD", "RKD")
    },
}


def teacher() -> Net:
    return Net().eval().requires_grad_(False)


def flags(network: nn.Module) -> list[bool]:
    return [p.requires_grad for p in network.parameters()] + [m.training for m in network.modules()]


@pytest.mark.parametrize("name", MADE)
def test_a_student_and_a_teacher_are_taken_in_this_order_and_left_alone(name: str) -> None:
    student, master = Net(), teacher()
    before = flags(student.fc), flags(master)
    made = MADE[name](student, master)
    assert made.student is student
    assert made.teacher is master
    assert (flags(student.fc), flags(master)) == before


@pytest.mark.parametrize("name", MADE)
def test_a_teacher_that_learns_is_refused(name: str) -> None:
    master = teacher()
    master.fc.bias.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"teacher: 1 of its parameters require grad \(fc\.bias\).*requires_grad_"
    ):
        MADE[name](Net(), master)
    assert master.fc.bias.requires_grad


@pytest.mark.parametrize("name", MADE)
def test_a_teacher_in_training_mode_is_refused(name: str) -> None:
    master = teacher()
    master.norm.train()
    with pytest.raises(
        ValueError, match=r"teacher: 1 of its modules are in training mode \(norm\).*teacher\.eval"
    ):
        MADE[name](Net(), master)
    assert master.norm.training


@pytest.mark.parametrize("name", MADE)
def test_a_student_with_nothing_to_learn_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"student: got a Net of which no parameter requires grad"):
        MADE[name](teacher(), teacher())


@pytest.mark.parametrize("name", MADE)
def test_swapped_networks_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^teacher: 6 of its parameters require grad"):
        MADE[name](teacher(), Net())


@pytest.mark.parametrize("change", [lambda t: t.train(), lambda t: t.requires_grad_(True)])
def test_a_trainers_loss_refuses_such_teachers_too(change: Callable[[nn.Module], nn.Module]) -> None:
    TrainerLoss(teacher())
    with pytest.raises(ValueError, match="teacher: "):
        TrainerLoss(change(teacher()))


@pytest.mark.parametrize("name", ["DMKD", "SurrogateKD", "SSDKD"])
def test_the_student_of_one_call_is_looked_at_as_well(name: str) -> None:
    made = MADE[name](None, teacher())
    arguments = () if name == "SSDKD" else (IMAGES,)
    with pytest.raises(ValueError, match="student: got a Net of which no parameter"):
        made.step(*arguments, student=teacher())
    with pytest.raises(ValueError, match="student: got None"):
        made.step(*arguments)


@pytest.mark.parametrize(
    "name",
    ["AT", "DIST", "DKD", "DMKD", "DiffKD", "FitNet", "KD", "Kdiffusion", "RKD", "SSDKD", "SurrogateKD"],
)
def test_all_but_the_two_networks_is_by_name(name: str) -> None:
    parameters = list(inspect.signature(getattr(methods, name)).parameters.values())
    assert [p.name for p in parameters[:2]] == ["student", "teacher"]
    assert len(parameters) > 2
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:])


def test_the_network_itself_and_many_names_are_said_in_short() -> None:
    with pytest.raises(ValueError, match=r"1 of its modules are in training mode \(the network itself\)"):
        check_networks(None, nn.ReLU())
    with pytest.raises(
        ValueError, match=r"6 of its parameters require grad \(conv\.weight, conv\.bias, norm\."
    ):
        check_networks(None, Net())
    student = Net()
    assert chosen_student(None, student) is student
    assert chosen_student(student, Net()) is student
