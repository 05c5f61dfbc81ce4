"""The paper's trends at the size of handwritten digits: what makes a set good is so here too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.data import load_dataset, relative_entropy, select_balanced
from kdfast.data.surrogate import leaves, shaders
from kdfast.methods import SurrogateKD, SurrogateKDConfig
from kdfast.models import create_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

SIDE, BUDGET = 8, 4000
PLAIN: dict[str, Any] = {"temperature": 10, "regime": "none", "mixup": False}


@dataclass(frozen=True)
class Bench:
    """A teacher of digits, and what to test its students on."""

    teacher: nn.Module
    mean: list[float]
    std: list[float]
    train: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        return (images - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    @torch.no_grad()
    def predict(self, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(self.normalised(part)).argmax(1) for part in images.split(500)])

    def accuracy(self, network: nn.Module) -> float:
        return float((self.predict(network.eval(), self.test) == self.labels).float().mean())

    def student(self, images: torch.Tensor, *, steps: int = 400, **config: Any) -> float:
        """Accuracy on real digits, in percent, of a student that saw these images."""
        torch.manual_seed(1)
        network = create_model("resnet8", 10)
        settings = SurrogateKDConfig(**{**PLAIN, **config})
        self.teacher.eval().requires_grad_(False)
        method = SurrogateKD(network, self.teacher, config=settings, mean=self.mean, std=self.std)
        train(network, steps, lambda rows: method.step(images[rows]), len(images))
        return 100 * self.accuracy(network)


def train(network: nn.Module, steps: int, loss: Any, count: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(0, count, (64,))).backward()
        optimizer.step()
        schedule.step()


def digits(side: int) -> Bench:
    """A teacher of digits of this side, and its statistics."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    real, held_out = (load_dataset("digits", split, image_size=side) for split in ("train", "test"))
    images = real.images.float() / 255  # type: ignore[attr-defined]
    mean, std = images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist()
    teacher = create_model("resnet8", 10)
    test = held_out.images.float() / 255  # type: ignore[attr-defined]
    made = Bench(teacher, mean, std, images, test, held_out.labels)
    train(
        teacher,
        400,
        lambda rows: F.cross_entropy(teacher(made.normalised(images[rows])), real.labels[rows]),
        len(images),
    )
    accuracy = made.accuracy(teacher)
    print(f"\nteacher {100 * accuracy:.1f} %")
    assert accuracy > 0.93  # 98.1 % at 8 × 8 and 99.7 % at 16 × 16, one seed
    return made


@pytest.fixture(scope="module")
def bench() -> Bench:
    return digits(SIDE)


@pytest.fixture(scope="module")
def pool(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    """Shader images, and the teacher's classes of them."""
    images = shaders(32_000, (SIDE, SIDE), seed=0).float() / 255
    return images, bench.predict(bench.teacher, images)


@pytest.fixture(scope="module")
def even(pool: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    images, predicted = pool
    return images[select_balanced(predicted, BUDGET, 10, seed=0)]


@pytest.fixture(scope="module")
def balanced(bench: Bench, even: torch.Tensor) -> float:
    """The student that the others are compared with: shaders, selected, soft targets."""
    return bench.student(even)


def test_balanced_beats_raw() -> None:
    """At 16 pixels: there shaders fall into the teacher's classes as unevenly as in the paper's Table 3."""
    bench, side = digits(16), (16, 16)
    images = shaders(32_000, side, seed=0).float() / 255
    predicted = bench.predict(bench.teacher, images)
    entropy = relative_entropy(torch.bincount(predicted, minlength=10))
    balanced = bench.student(images[select_balanced(predicted, 2000, 10, seed=0)])
    raw = bench.student(images[:2000])
    print(f"\nshaders: balanced {balanced:.1f} %, raw {raw:.1f} % (relative entropy {entropy:.3f})")
    # Eight seeds of set and student: relative entropy 0.618 to 0.635, 50.0 to 61.4 % against 26.7 to 36.4 %, the gain
    # 20.5 to 29.7 points (an earlier record: 68.9 and 24.4 %, 48.3 and 26.4 %).
    assert entropy < 0.67
    assert balanced >= raw + 10


def test_digits_beat_shaders_and_leaves_and_both_teach(bench: Bench, balanced: float) -> None:
    """Nothing orders shaders and leaves here: their difference is −7.5 to 5.3 points over nine seeds."""
    real = bench.student(bench.train)
    painted = leaves(8000, (SIDE, SIDE), seed=0).float() / 255
    chosen = select_balanced(bench.predict(bench.teacher, painted), BUDGET, 10, seed=0)
    fallen = bench.student(painted[chosen])
    print(f"\ndigits {real:.1f} %, shaders {balanced:.1f} %, leaves {fallen:.1f} %")
    # Nine seeds: digits 98.3 to 99.2 %, shaders 85.3 to 93.3 %, leaves 87.8 to 93.6 %, the gap 4.7 to 8.6 points
    # (an earlier record: 98.6, 84.2 and 78.9 %).
    assert real > max(balanced, fallen) + 2
    assert min(balanced, fallen) > 65


def test_soft_targets_beat_the_teachers_class(bench: Bench, even: torch.Tensor, balanced: float) -> None:
    one_hot = bench.student(even, targets="one_hot")
    smoothed = bench.student(even, targets="label_smoothing")
    print(f"\nsoft {balanced:.1f} %, one-hot {one_hot:.1f} %, smoothed {smoothed:.1f} %")
    # Eight seeds: 85.3 to 93.3 %, 76.9 to 84.2 %, 74.2 to 80.6 %, soft ones ahead by 6.1 to 16.1 points.
    assert balanced > max(one_hot, smoothed)


def test_the_attack_helps_an_unbalanced_set(bench: Bench, pool: tuple[torch.Tensor, torch.Tensor]) -> None:
    raw = pool[0][:BUDGET]
    attack: dict[str, Any] = {"attack_steps": 8, "epsilon": 0.1, "alpha": 0.01, "include_original": True}
    without, with_pairs = bench.student(raw, steps=250), bench.student(raw, steps=250, attack=True, **attack)
    print(f"\nraw shaders: {without:.1f} %, with the attack {with_pairs:.1f} %")
    # Eight seeds: 73.1 to 83.3 % and 81.4 to 89.7 %, the gain 4.5 to 13.6 points.
    assert with_pairs >= without + 1
