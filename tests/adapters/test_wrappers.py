"""Distiller inside Lightning, Accelerate and FSDP: one batch's gradient, however it is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdfast.adapters import Distiller
from kdfast.nn import KDLoss
from tests.support.ranks import ranks


def networks() -> tuple[nn.Linear, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(5, 4), nn.Linear(5, 4).eval().requires_grad_(False), torch.randn(8, 5)


def by_hand() -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of all eight rows at once."""
    student, teacher, x = networks()
    loss = KDLoss(2.0)(student(x), teacher(x))
    return loss.detach(), torch.autograd.grad(loss, student.weight)[0]


def with_lightning(rank: int, out: str, batch: int, accumulate: int, devices: int) -> torch.Tensor:
    """What one step of SGD with rate 1 does to the student, and behind it the mean loss."""
    lightning = pytest.importorskip("lightning")
    student, teacher, x = networks()

    class Lit(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.kd = Distiller(student, teacher, loss=KDLoss(2.0))
            self.losses: list[torch.Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.kd.step(batch)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    before, lit = student.weight.detach().clone(), Lit()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=devices, accumulate_grad_batches=accumulate, logger=False,
        strategy="auto" if devices == 1 else "ddp", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=out, barebones=False,
    )  # fmt: skip
    trainer.fit(lit, DataLoader(TensorDataset(x), batch_size=batch))
    assert not any("teacher" in name for name in lit.state_dict())
    assert not teacher.training
    mean = torch.stack(lit.losses).mean()
    return torch.cat([(before - student.weight.detach()).flatten(), mean.reshape(1)])


def with_accelerate(rank: int, batch: int, accumulate: int) -> torch.Tensor:
    accelerate = pytest.importorskip("accelerate")
    student, teacher, x = networks()
    before = student.weight.detach().clone()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    kd = Distiller(student, teacher, loss=KDLoss(2.0))
    kd, optimizer, loader = accelerator.prepare(
        kd, torch.optim.SGD(student.parameters(), lr=1.0), DataLoader(TensorDataset(x), batch_size=batch)
    )
    losses = []
    for rows in loader:
        with accelerator.accumulate(kd):
            loss = kd(distil=rows)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    mean = accelerator.reduce(torch.stack(losses).mean(), "mean")
    return torch.cat([(before - student.weight.detach()).flatten(), mean.reshape(1)])


def with_fsdp(rank: int) -> torch.Tensor:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo")
    student, teacher, x = networks()
    fully_shard(student, mesh=init_device_mesh("cpu", (2,)))
    Distiller(student, teacher, loss=KDLoss(2.0)).step((x[4 * rank : 4 * rank + 4],)).backward()
    grad: Any = student.weight.grad
    whole: torch.Tensor = grad.full_tensor()
    dist.destroy_process_group()
    return whole


def agrees(got: torch.Tensor) -> None:
    loss, grad = by_hand()
    torch.testing.assert_close(got, torch.cat([grad.flatten(), loss.reshape(1)]), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("batch, accumulate", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_lightning_is_one_batch(tmp_path: Path, batch: int, accumulate: int) -> None:
    agrees(with_lightning(0, str(tmp_path), batch, accumulate, 1))


@pytest.mark.slow
@pytest.mark.parametrize("batch, accumulate", [(4, 1), (1, 4)])
def test_lightning_on_two_ranks_is_one_batch(tmp_path: Path, batch: int, accumulate: int) -> None:
    pytest.importorskip("lightning")
    found = ranks(with_lightning, str(tmp_path), batch, accumulate, 2)
    for got in found:
        torch.testing.assert_close(torch.from_numpy(got)[:-1], by_hand()[1].flatten(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(sum(float(got[-1]) for got in found) / 2), by_hand()[0])


@pytest.mark.parametrize("batch, accumulate", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_accelerate_is_one_batch(batch: int, accumulate: int) -> None:
    agrees(with_accelerate(0, batch, accumulate))


@pytest.mark.slow
@pytest.mark.parametrize("batch, accumulate", [(4, 1), (1, 4)])
def test_accelerate_on_two_ranks_is_one_batch(batch: int, accumulate: int) -> None:
    pytest.importorskip("accelerate")
    for got in ranks(with_accelerate, batch, accumulate):
        agrees(torch.from_numpy(got))


@pytest.mark.slow
def test_a_sharded_student_synchronises() -> None:
    for got in ranks(with_fsdp):
        torch.testing.assert_close(torch.from_numpy(got), by_hand()[1], rtol=1e-4, atol=1e-6)
