"""The adapters inside TRL's own GKDTrainer: loss and gradient are one batch's, however it is split."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdfast.adapters import GKDMixin
from tests.support.language_models import language_model, one_step, rows
from tests.support.ranks import ranks

pytest.importorskip("trl")
gkd = pytest.importorskip("trl.experimental.gkd")
transformers = pytest.importorskip("transformers")

BETA, VOCABULARY = 0.3, 40


def tokenizer() -> Any:
    """Which the trainer asks for, and no text goes through."""
    from tokenizers import Tokenizer, models

    words = {f"w{at}": at for at in range(VOCABULARY)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="w0", eos_token="w1"
    )


def dataset() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([{key: x.tolist() for key, x in row.items()} for row in rows()])


def collated(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids, labels = (
        torch.stack([torch.as_tensor(row[key]) for row in found]) for key in ("input_ids", "labels")
    )
    ones = torch.ones_like(ids)
    return {"input_ids": ids, "labels": labels, "attention_mask": ones, "prompts": ids[:, :1],
            "prompt_attention_mask": ones[:, :1]}  # fmt: skip


def change(out: str, batch: int, accumulate: int) -> torch.Tensor:
    """What one step of SGD with rate 1 does to the head, and behind it the loss that the trainer reports."""

    class Trainer(GKDMixin, gkd.GKDTrainer):  # type: ignore[name-defined, misc]
        pass

    arguments = gkd.GKDConfig(
        **one_step(out, batch, accumulate),
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        lmbda=0.0,
        beta=BETA,
    )
    student = language_model(8, 0)
    trainer = Trainer(
        model=student,
        teacher_model=language_model(16, 1).eval().requires_grad_(False),
        args=arguments,
        data_collator=collated,
        train_dataset=dataset(),
        processing_class=tokenizer(),
    )
    before = student.lm_head.weight.detach().clone()
    reported = trainer.train().training_loss
    return torch.cat([(before - student.lm_head.weight.detach()).flatten(), torch.tensor([reported])])


def by_hand() -> torch.Tensor:
    """The definition, of all rows at once, in float64."""
    batch = collated(rows())
    student, teacher = language_model(8, 0).double(), language_model(16, 1).double().eval()
    s, t = (
        model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1) for model in (student, teacher)
    )
    m = (BETA * t.exp() + (1 - BETA) * s.exp()).log()
    terms = BETA * F.kl_div(m, t, reduction="none", log_target=True)
    terms = terms + (1 - BETA) * F.kl_div(m, s, reduction="none", log_target=True)
    counted = batch["labels"][:, 1:] != -100
    loss = terms.sum(-1)[counted].mean()
    (grad,) = torch.autograd.grad(loss, student.lm_head.weight)
    return torch.cat([grad.flatten(), loss.detach().reshape(1)]).float()


@pytest.mark.slow
@pytest.mark.parametrize("batch, accumulate", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_gkd_trainer_is_one_batch(tmp_path: Path, batch: int, accumulate: int) -> None:
    torch.testing.assert_close(change(str(tmp_path), batch, accumulate), by_hand(), rtol=1e-3, atol=2e-6)


def _change_of(rank: int, *args: Any) -> torch.Tensor:
    return change(*args)


@pytest.mark.slow
@pytest.mark.parametrize("batch, accumulate", [(4, 1), (1, 4)])
def test_gkd_trainer_on_two_ranks_is_one_batch(tmp_path: Path, batch: int, accumulate: int) -> None:
    for got in ranks(_change_of, str(tmp_path), batch, accumulate):
        torch.testing.assert_close(torch.from_numpy(got)[:-1], by_hand()[:-1], rtol=1e-3, atol=2e-6)


def test_the_page_names_versions_that_the_extra_takes() -> None:
    """What it says they ran with is what a reader may install."""
    page = (Path(__file__).parents[2] / "docs/pages/adapters.md").read_text()
    for name in ("trl", "transformers", "accelerate"):
        major = importlib.metadata.version(name).split(".")[0]
        assert f"{name} {major}." in page
