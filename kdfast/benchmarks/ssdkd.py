"""An epoch of SSD-KD, and its two phases: kdfast beside the same algorithm written in eager PyTorch.

A case is a whole epoch (a round of inversion and the distillation steps that follow), or one phase of it: seconds by
phase. All providers have the networks, sizes and coefficients of the case, and a full buffer to begin with; their
random numbers are their own, so what is checked is that images were made, and that a step at the same student costs
what it should. What the eager versions do: ``_ssdkd_eager.py``.

No traffic is counted: an epoch is mostly the networks' convolutions, which are the same for everyone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdfast.benchmarks._ssdkd_eager import EagerSSDKD, FilesSSDKD, MemorySSDKD
from kdfast.benchmarks.case import Case, Provider, Settings, Work
from kdfast.methods.ssdkd import SSDKD, SSDKDConfig
from kdfast.models import create_model

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CLASSES = 10
#: Deepest, then what a CPU finishes while one waits, then what shows that everything runs.
NETWORKS = {"paper": ("wrn_40_2", "wrn_16_1"), "small": ("wrn_16_1", "wrn_16_1")}


@dataclass(frozen=True)
class Size:
    """Of one row of cases."""

    networks: str
    side: int
    capacity: int
    batch: int
    inversion_steps: int
    generator_width: int
    latent: int


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    tiny = Size("small", 8, 32, 8, 2, 4, 8)
    if settings.device == "cuda":
        # The quick one has a quarter of the paper's rows, and so of its distillation steps.
        sizes = tiny, Size("paper", 32, 1280, 256, 5, 64, 256), Size("paper", 32, 5000, 256, 5, 64, 256)
    else:
        sizes = tiny, Size("small", 16, 64, 16, 5, 8, 32), Size("paper", 32, 512, 64, 5, 64, 256)
    size = settings.pick(*sizes)
    inputs = Inputs(size, settings.device)
    for name in ("epoch", "inversion round", "distillation steps"):
        yield _case(name, inputs)


class Inputs:
    """Networks, rows and coefficients that every provider begins with."""

    def __init__(self, size: Size, device: str) -> None:
        self.size, self.device = size, device
        self.config = SSDKDConfig(
            capacity=size.capacity,
            fill_epochs=0,  # the buffer is full; both terms count from the first round
            synthesis_batch=size.batch,
            inversion_steps=size.inversion_steps,
            latent=size.latent,
            generator_width=size.generator_width,
            reset_round=None,
        )

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Teacher, with running statistics that are not those it was born with, and student."""
        torch.manual_seed(0)
        teacher, student = (create_model(name, CLASSES) for name in NETWORKS[self.size.networks])
        with torch.no_grad():
            for _ in range(3):
                teacher.train()(torch.randn(32, 3, self.size.side, self.size.side))
        return teacher.eval().to(self.device), student.train().to(self.device)

    def rows(self) -> Tensor:
        """uint8 ``[capacity, 3, side, side]``."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.size.capacity, 3, self.size.side, self.size.side)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(self.device)


class Runner(NamedTuple):
    """A provider's two phases."""

    synthesize: Callable[[], Tensor]
    distil: Callable[[], float]


def eager(kind: type[EagerSSDKD], inputs: Inputs) -> Runner:
    """One of the eager versions, its buffer full."""
    teacher, student = inputs.networks()
    method = kind(
        teacher=teacher,
        student=student,
        optimizer=_optimizer(student),
        config=inputs.config,
        images=inputs.rows(),
        mean=MEAN,
        std=STD,
        batch_size=inputs.size.batch,
    )
    return Runner(method.synthesize, method.distil)


def ours(inputs: Inputs) -> Runner:
    """kdfast, its buffer full."""
    teacher, student = inputs.networks()
    side = inputs.size.side
    method = SSDKD(
        student,
        teacher.requires_grad_(False),
        config=inputs.config,
        image_shape=(3, side, side),
        mean=MEAN,
        std=STD,
        batch_size=inputs.size.batch,
        device=inputs.device,
    )
    for _ in range(math.ceil(inputs.size.capacity / inputs.size.batch)):
        method.synthesize()
    optimizer = _optimizer(student)

    def distil() -> float:
        total = torch.zeros((), device=inputs.device)
        for _ in range(method.steps):
            loss = method.step()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.detach()
        return float(total) / method.steps

    return Runner(method.synthesize, distil)


def _optimizer(student: nn.Module) -> torch.optim.Optimizer:
    # A rate of 0: every turn, and every provider, does the work of the same student.
    return torch.optim.SGD(student.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)


def _case(name: str, inputs: Inputs) -> Case:
    size = inputs.size

    def built(make: Callable[[], Runner]) -> Callable[[], Work]:
        def build() -> Work:
            runner = make()
            if name == "epoch":
                return lambda turn: (runner.synthesize(), runner.distil())
            if name == "inversion round":
                return lambda turn: (runner.synthesize(), None)
            return lambda turn: (None, runner.distil())

        return build

    def check(provider: str, result: tuple[Tensor | None, float | None]) -> None:
        images, loss = result
        if images is not None:
            assert images.dtype == torch.uint8
            assert images.shape == (size.batch, 3, size.side, size.side)
            assert images.float().std() > 1, "images without content"
        if loss is not None:
            assert 0 < loss < math.inf, f"mean loss {loss}"

    providers = (
        Provider(
            "eager, files",
            built(lambda: eager(FilesSSDKD, inputs)),
            graph=False,
            config="PNG files, DataLoader with two workers made each epoch",
        ),
        Provider("eager, memory", built(lambda: eager(MemorySSDKD, inputs)), graph=False),
        Provider("kdfast", built(lambda: ours(inputs)), graph=False),
    )
    teacher, student = NETWORKS[size.networks]
    params = {"networks": f"{teacher} to {student}", "image": f"3x{size.side}x{size.side}"}
    params |= {"rows": size.capacity, "batch": size.batch, "T_g": size.inversion_steps}  # type: ignore[dict-item]
    steps = inputs.config.steps_per_epoch(size.batch)
    items = {"epoch": 1, "inversion round": size.batch, "distillation steps": steps}[name]
    unit = {"epoch": "epoch", "inversion round": "images", "distillation steps": "steps"}[name]
    return Case("ssdkd", name, params, 1, providers, check, items, unit)
