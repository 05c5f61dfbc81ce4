"""The adapters inside the real 🤗 Trainer and two gloo processes: the gradient is one batch's, however it is split."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdfast.adapters import Distiller, TrainerLoss, generalized_jsd_loss
from kdfast.nn import KDLoss
from tests.support.language_models import language_model, one_step, rows
from tests.support.ranks import ranks

transformers = pytest.importorskip("transformers")


def change(out: str, batch: int, accumulate: int, weights: tuple[float, float]) -> torch.Tensor:
    """What one step of SGD with rate 1 does to the head: minus its gradient."""
    student, teacher = language_model(8, 0), language_model(16, 1).eval().requires_grad_(False)
    kd = TrainerLoss(teacher, kd_weight=weights[0], ce_weight=weights[1], shift_labels=True)

    class DistillationTrainer(transformers.Trainer):  # type: ignore[name-defined, misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return kd(model, inputs, return_outputs, num_items_in_batch)

    arguments = transformers.TrainingArguments(**one_step(out, batch, accumulate))
    before = student.lm_head.weight.detach().clone()
    DistillationTrainer(model=student, args=arguments, train_dataset=rows()).train()
    return before - student.lm_head.weight.detach()


WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["kd", "ce", "both"])
def test_accumulation_in_the_trainer_is_one_batch(tmp_path: Path, weights: tuple[float, float]) -> None:
    whole = change(str(tmp_path), 8, 1, weights)
    assert whole.norm() > 0.01
    for batch, accumulate in ((4, 2), (2, 4), (1, 8)):
        got = change(str(tmp_path), batch, accumulate, weights)
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-6)


def _change_of(rank: int, *args: Any) -> torch.Tensor:
    return change(*args)


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS, ids=["kd", "ce", "both"])
def test_two_processes_in_the_trainer_are_one_batch(tmp_path: Path, weights: tuple[float, float]) -> None:
    whole = change(str(tmp_path), 8, 1, weights)
    for batch, accumulate in ((4, 1), (1, 4)):
        for got in ranks(_change_of, str(tmp_path), batch, accumulate, weights):
            torch.testing.assert_close(torch.from_numpy(got), whole, rtol=1e-4, atol=1e-6)


def _distill(rank: int, way: str) -> torch.Tensor | str:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    student, teacher = nn.Linear(5, 4), nn.Linear(5, 4).eval().requires_grad_(False)
    x = torch.randn(8, 5)[4 * rank : 4 * rank + 4]
    if way == "student":
        distiller = Distiller(DistributedDataParallel(student), teacher, loss=KDLoss(2.0))
        distiller.step((x,)).backward()
    else:
        distiller = Distiller(student, teacher, loss=KDLoss(2.0))
        wrapped = DistributedDataParallel(distiller)
        if way == "past":
            with pytest.raises(RuntimeError, match="step: 2 processes run"):
                wrapped.module.step((x,))
        wrapped(distil=(x,)).backward()
    dist.destroy_process_group()
    assert student.weight.grad is not None
    return student.weight.grad.clone()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["student", "whole", "past"])
def test_a_distiller_synchronises_or_refuses(way: str) -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(5, 4), nn.Linear(5, 4).eval().requires_grad_(False)
    x = torch.randn(8, 5)
    Distiller(student, teacher, loss=KDLoss(2.0)).step((x,)).backward()
    for got in ranks(_distill, way):
        torch.testing.assert_close(torch.from_numpy(got), student.weight.grad)


def test_trls_signature_and_count() -> None:
    """TRL 1.7 and later hand the count of the whole step on."""
    s, t = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    labels = torch.randint(9, (2, 5))
    labels[0, :3] = -100
    total = generalized_jsd_loss(s, t, labels, 0.4, 0.9, "sum")
    got = generalized_jsd_loss(s, t, labels, 0.4, 0.9, num_items_in_batch=torch.tensor(28))
    torch.testing.assert_close(got, total / 28)
    gkd = pytest.importorskip("trl.experimental.gkd")
    theirs = gkd.GKDTrainer.generalized_jsd_loss
    assert list(inspect.signature(theirs).parameters) == list(
        inspect.signature(generalized_jsd_loss).parameters
    )
    for options in ({"num_items_in_batch": 28}, {"reduction": "sum"}, {}):
        for beta in (0, 0.4, 1):
            call = {"labels": labels, "beta": beta, "temperature": 0.9, **options}
            torch.testing.assert_close(
                generalized_jsd_loss(s, t, **call), theirs(s, t, **call), rtol=2e-5, atol=1e-6
            )
