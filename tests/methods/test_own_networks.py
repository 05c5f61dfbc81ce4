"""What people bring along: wrappers that call train(), batch norms that they froze, outputs that are no tensor."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdfast import methods
from kdfast.models.modes import evaluated
from kdfast.models.outputs import logits_of
from tests.methods.test_roles import MADE, Net, teacher
from tests.support.ssdkd import SHAPE, TINY

METHODS = [name for name in MADE if name != "Distiller"]
CHANNELS, SIZE, _ = SHAPE


def batch(name: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


def stepped(name: str, made: Any) -> Tensor:
    """A whole step of a method, rounds of inversion included."""
    torch.manual_seed(5)
    if name == "SSDKD":
        while not made.ready:
            made.synthesize()
        return made.step()
    return made.step(batch(name))


def statistics(network: nn.Module) -> list[Tensor]:
    return [value.clone() for value in network.buffers()]


# --- the teacher's mode ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_that_was_put_into_training_mode_is_refused_before_it_runs(name: str) -> None:
    master = teacher()
    made = MADE[name](Net(), master)
    stepped(name, made)
    before = statistics(master)
    master.train()  # as a wrapper does that holds it as a submodule
    with pytest.raises(ValueError, match=r"^teacher: 4 of its modules are in training mode.*teacher\.eval"):
        stepped(name, made)
    if name == "SSDKD":
        with pytest.raises(ValueError, match=r"^teacher: 4 of its modules"):
            made.synthesize()
        with pytest.raises(ValueError, match=r"^teacher: 4 of its modules"):
            made.update(torch.optim.SGD(made.student.parameters(), 0.1))
    for now, then in zip(master.buffers(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    master.eval()
    stepped(name, made)


@pytest.mark.parametrize("name", ["DiffKD", "Kdiffusion"])
def test_a_loop_of_ones_own_is_told_too(name: str) -> None:
    master = teacher()
    made = MADE[name](Net(), master)
    images, labels = batch(name)
    logits = made.student(images)
    with torch.no_grad():
        master.train()(images)
    with pytest.raises(ValueError, match=r"^teacher: 4 of its modules are in training mode"):
        made.loss() if name == "DiffKD" else made(logits, labels)


# --- frozen batch norms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_batch_norms_that_are_frozen_stay_frozen(name: str) -> None:
    student = Net()
    student.norm.eval()
    made = MADE[name](student, teacher())
    norms = [m for m in made.student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.training for m in norms] == [False]
    before = statistics(norms[0])
    stepped(name, made)
    assert [m.training for m in norms] == [False]
    torch.testing.assert_close(statistics(norms[0]), before, rtol=0, atol=0)
    assert student.training
    assert student.conv.training


@pytest.mark.parametrize("name", ["DiffKD", "Kdiffusion"])
def test_a_look_at_the_maps_leaves_every_mode(name: str) -> None:
    student = Net()
    student.norm.eval()
    made = MADE[name](student, teacher())
    before = [module.training for module in made.modules()]
    made.maps(batch(name)[0])
    assert [module.training for module in made.modules()] == before


def fail_within(network: nn.Module) -> None:
    with evaluated(network):
        assert not any(module.training for module in network.modules())
        raise RuntimeError("within")


def test_modes_come_back_after_an_error() -> None:
    network = Net()
    network.norm.eval()
    with pytest.raises(RuntimeError, match="within"):
        fail_within(network)
    assert [module.training for module in network.modules()] == [True, True, False, True]


# --- outputs --------------------------------------------------------------------------------------------------------


@dataclass
class Output:
    """As 🤗's, a loss before the logits."""

    loss: Any
    logits: Tensor


class Wrapped(Net):
    """Puts its logits out in one of the forms that libraries have."""

    form = "tensor"

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        loss = logits.new_zeros(())
        return {
            "tensor": logits,
            "tuple": (logits, None),
            "segmentation": OrderedDict(out=logits, aux=-logits),
            "dict": {"loss": loss, "logits": logits},
            "object": Output(loss, logits),
        }[self.form]


def loss_of(name: str, form: str) -> float:
    torch.manual_seed(3)
    student, master = Wrapped(), Wrapped()
    student.form = master.form = form
    made = MADE[name](student, master.eval().requires_grad_(False))
    return float(stepped(name, made).detach())


@pytest.mark.parametrize("form", ["tuple", "segmentation", "dict", "object"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "DiffKD"])
def test_every_method_takes_outputs_that_are_no_tensor(name: str, form: str) -> None:
    assert loss_of(name, form) == loss_of(name, "tensor")


@pytest.mark.parametrize("form", ["tuple", "segmentation", "dict", "object"])
def test_diffkd_takes_them_where_its_taps_are(form: str) -> None:
    assert loss_of("DiffKD", form) == loss_of("DiffKD", "tensor")


def test_huggingface_outputs() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    logits = torch.zeros(2, 3)
    found = outputs.ImageClassifierOutput(loss=torch.zeros(()), logits=logits)
    assert logits_of(found) is logits
    assert logits_of(outputs.ImageClassifierOutput(logits=logits)) is logits


@pytest.mark.parametrize("wrong", [None, "logits", [], {}, {"loss": 3.0}, (None, torch.zeros(1))])
def test_an_output_without_logits_is_refused(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=r"output: got .*; a tensor is needed, or a dict, tuple or object with logits"
    ):
        logits_of(wrong)


@pytest.mark.parametrize("form", ["dict", "segmentation"])
def test_ssdkd_tells_classes_from_pixels_in_such_outputs(form: str) -> None:
    student, master = Wrapped(), Wrapped()
    student.form = master.form = form
    made = methods.SSDKD(
        student, master.eval().requires_grad_(False), config=methods.SSDKDConfig(**TINY), image_shape=SHAPE
    )
    assert made.num_classes == 5
