"""DiffKD in miniature on real digits, beside plain KD with the same student, batches and schedule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.data import load_dataset
from kdfast.methods.baselines import KD
from kdfast.methods.diffkd import DiffKD, DiffKDConfig
from kdfast.models import create_model


def digits(split: str) -> tuple[Tensor, Tensor]:
    data: Any = load_dataset("digits", split, image_size=16)
    return data.images.float().div(127.5).sub(1), data.labels


def train(network: nn.Module, parameters: Any, step: Any, data: tuple[Tensor, Tensor], epochs: int) -> None:
    images, labels = data
    batches = [index for _ in range(epochs) for index in torch.randperm(len(images)).split(64)[:-1]]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=len(batches))
    network.train()
    for index in batches:
        optimizer.zero_grad()
        step((images[index], labels[index])).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((network.eval()(data[0]).argmax(1) == data[1]).float().mean())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_is_no_worse_than_plain_kd() -> None:
    """Three seeds. Two standard errors of 360 test images at 95 % are 2.3 points; twice that is asserted.

    Once on a CPU: 98.6, 98.6, 98.9 % for DiffKD, 100.0, 98.1, 98.9 % for KD.
    """
    data, test = digits("train"), digits("test")
    torch.manual_seed(0)
    teacher = create_model("resnet14", 10)
    train(teacher, teacher.parameters(), lambda b: F.cross_entropy(teacher(b[0]), b[1]), data, 5)
    assert accuracy(teacher, test) > 0.95
    teacher.requires_grad_(False)
    reached: dict[str, list[float]] = {"DiffKD": [], "KD": []}
    for seed in range(3):
        torch.manual_seed(seed)
        start = create_model("resnet8", 10)
        for name in reached:
            torch.manual_seed(seed)
            student = copy.deepcopy(start)
            method: Any = (
                KD(student, teacher)
                if name == "KD"
                else DiffKD(student, teacher, config=DiffKDConfig(latent_channels=32))
            )
            train(method, method.parameters(), method.step, data, 6)
            reached[name].append(accuracy(student, test))
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.4f}" for name, values in reached.items()))
    means = {name: sum(values) / 3 for name, values in reached.items()}
    assert means["DiffKD"] > 0.85
    assert means["DiffKD"] > means["KD"] - 0.05
