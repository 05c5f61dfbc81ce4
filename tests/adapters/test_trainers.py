"""The adapters equal what they replace, on the calls that people have in their code."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast.adapters import Distiller, KLDivLoss, TrainerLoss, generalized_jsd_loss
from kdfast.functional import dkd_loss, kd_kl_div
from kdfast.nn import DKDLoss, KDLoss


def draw(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(shape, generator=generator), 3 * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.filterwarnings("ignore:reduction")
def test_kl_div_loss_is_torchs(reduction: Any, log_target: bool) -> None:
    s, t = draw(4, 7)
    s.requires_grad_()
    target = F.log_softmax(t / 4, -1) if log_target else F.softmax(t / 4, -1)
    losses = [
        kind(reduction=reduction, log_target=log_target)(F.log_softmax(s / 4, -1), target)
        for kind in (KLDivLoss, nn.KLDivLoss)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in losses), rtol=1e-5, atol=1e-7)


EDGES = {
    "zero probabilities": torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]),
    "a row multiplied away": torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.3, 0.5]]),
    "rows that do not sum to 1": torch.tensor([[3.0, 0.25, 0.75], [0.1, 0.1, 0.1]]),
    "one row for all": torch.tensor([0.2, 0.3, 0.5]),
    "probabilities over dim 0": torch.tensor([[0.2, 0.3, 0.5], [0.8, 0.7, 0.5]]),
    "not a number": torch.tensor([[math.nan, 0.25, 0.75], [1.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("target", EDGES.values(), ids=EDGES)
@pytest.mark.filterwarnings("ignore:reduction")
def test_kl_div_loss_is_torchs_on_what_is_no_softmax(reduction: Any, target: torch.Tensor) -> None:
    results = []
    for kind in (KLDivLoss, nn.KLDivLoss):
        given = draw(2, 3)[0].requires_grad_()
        loss = kind(reduction=reduction)(given, target)
        results.append((loss, torch.autograd.grad(loss.sum(), given)[0]))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def trl_form(
    s: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor | None,
    beta: float,
    temperature: float,
    reduction: str,
) -> torch.Tensor:
    """What TRL's documentation defines, elementwise and then reduced."""
    log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    if beta == 0:
        terms = log_p.exp() * (log_p - log_q)
    elif beta == 1:
        terms = log_q.exp() * (log_q - log_p)
    else:
        log_m = torch.logaddexp(log_q + math.log(1 - beta), log_p + math.log(beta))
        terms = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    if labels is not None:
        terms = terms[labels != -100]
    count = {"sum": 1, "mean": terms.numel(), "batchmean": terms.size(0)}[reduction]
    return terms.sum() / count


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("labelled", [True, False])
def test_generalized_jsd_is_trls(reduction: Any, beta: float, labelled: bool) -> None:
    s, t = draw(2, 5, 9)
    labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 2, 3, 4, -100]]) if labelled else None
    got = generalized_jsd_loss(s, t, labels, beta, 0.9, reduction)
    torch.testing.assert_close(got, trl_form(s, t, labels, beta, 0.9, reduction), rtol=2e-5, atol=1e-7)


class Model(nn.Module):
    """A causal language model's interface: keyword inputs, logits and a shifted loss out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> SimpleNamespace:
        logits = self.head(self.embed(input_ids))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def frozen(teacher: Any) -> Any:
    return teacher.eval().requires_grad_(False)


def language_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def test_trainer_loss_weighs_both_parts_over_tokens_that_count() -> None:
    student, teacher, batch = Model(4), frozen(Model(8)), language_batch()
    loss, outputs = TrainerLoss(teacher, temperature=2.0, kd_weight=0.7, ce_weight=0.3, shift_labels=True)(
        student, batch, return_outputs=True
    )
    keep = batch["labels"][:, 1:] != -100
    s, t = (model(batch["input_ids"]).logits[:, :-1][keep] for model in (student, teacher))
    want = 0.7 * kd_kl_div(s, t.detach(), 2.0) + 0.3 * outputs.loss
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert student.head.weight.grad is not None
    assert teacher.head.weight.grad is None
    assert not teacher.training


def test_trainer_loss_divides_by_the_whole_step() -> None:
    student, teacher, batch = Model(4), frozen(Model(8)), language_batch()
    kd = TrainerLoss(teacher, kd_weight=1.0, ce_weight=0.0, beta=0.5, shift_labels=True)
    counted = int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(kd(student, batch, num_items_in_batch=4 * counted) * 4, kd(student, batch))


def test_trainer_loss_says_when_labels_are_missing() -> None:
    with pytest.raises(ValueError, match="inputs: the model returned no loss"):
        TrainerLoss(frozen(Model(4)))(Model(4), {"input_ids": language_batch()["input_ids"]})


def test_distiller_keeps_the_teacher_out_of_everything_but_the_loss() -> None:
    student, teacher = nn.Linear(3, 5), frozen(nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5)))
    kd = Distiller(student, teacher, loss=KDLoss(4.0)).train()
    x, _ = draw(6, 3)
    loss = kd.step((x, torch.zeros(6)))
    torch.testing.assert_close(loss, kd_kl_div(student(x), teacher(x).detach(), 4.0))
    loss.backward()
    assert [name for name, _ in kd.named_parameters()] == ["student.weight", "student.bias"]
    assert set(kd.state_dict()) == {"student.weight", "student.bias"}
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(kd(x), student(x))
    kd.double()
    assert teacher[0].weight.dtype == torch.float64
    buffer = io.BytesIO()
    torch.save(kd.state_dict(), buffer)


def test_distiller_hands_the_target_on() -> None:
    student, teacher = nn.Linear(3, 5), frozen(nn.Linear(3, 5))
    x, _ = draw(6, 3)
    y = torch.arange(6) % 5
    kd = Distiller(student, teacher, loss=DKDLoss(1.0, 8.0, 4.0), with_target=True)
    torch.testing.assert_close(kd.step((x, y)), dkd_loss(student(x), teacher(x), y))
    with pytest.raises(ValueError, match="batch: got 1 tensor"):
        kd.step((x,))


def test_refusals_name_the_argument() -> None:
    with pytest.raises(ValueError, match="reduction: got 'median'"):
        KLDivLoss("median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction: got 'none'"):
        generalized_jsd_loss(*draw(2, 3), reduction="none")  # type: ignore[arg-type]
