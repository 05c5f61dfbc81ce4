"""One training step of a method, from images on the device to updated weights: kdfast beside careful eager PyTorch.

The peer is the step that a competent person writes, with everything that costs one line: a frozen teacher under
``no_grad``, channels-last networks, bfloat16 autocast on a GPU, gradients set to None, CutMix and mixup by the usual
recipes on the device, ``F.kl_div``. It has the same networks, weights, images and optimiser as kdfast's. Most of a
step is convolutions, which are nobody's to speed up here: what is left between the two is what kdfast is worth in a
training run.

The images that the two networks saw are kept, and the check computes the loss of those in float64: each provider
draws its own boxes and shares.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.benchmarks.case import Absent, Case, Provider, Settings, Work
from kdfast.models import create_model

CUTMIX_ALPHA = 0.25
DMKD_TEMPERATURE, SURROGATE_TEMPERATURE = 10.0, 20.0

#: ``(student, teacher, images) -> loss``.
Step = Callable[[nn.Module, nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Size:
    """What is distilled from what."""

    teacher: str
    student: str
    classes: int
    batch: int
    side: int


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    for size in _sizes(settings):
        networks = _Networks(size, settings)
        yield _case("DM-KD step", networks, eager_dmkd, _ours_dmkd, DMKD_TEMPERATURE)
        yield _case("SurrogateKD step", networks, eager_surrogate, _ours_surrogate, SURROGATE_TEMPERATURE)


def _sizes(settings: Settings) -> list[_Size]:
    if settings.device == "cpu":
        small = settings.pick(4, 16, 64)
        return [_Size("resnet20", "resnet8", 100, small, 32)]
    cifar = _Size("wrn_40_2", "wrn_16_2", 100, settings.pick(8, 64, 64), 32)
    imagenet = _Size("resnet50", "resnet18", 1000, 256, 224)
    return [cifar] if settings.tiny else [cifar, imagenet]


def _kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    log_q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def eager_dmkd(student: nn.Module, teacher: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """CutMix (one box a batch), then the softened outputs of both."""
    lam = float(torch.distributions.Beta(CUTMIX_ALPHA, CUTMIX_ALPHA).sample())
    height, width = images.shape[-2:]
    half_y, half_x = (int(size * (1 - lam) ** 0.5 / 2) for size in (height, width))
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    rows = slice(max(0, y - half_y), y + half_y)
    columns = slice(max(0, x - half_x), x + half_x)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[torch.randperm(len(images), device=images.device), :, rows, columns]
    with torch.no_grad():
        target = teacher(mixed)
    return _kl(student(mixed), target, DMKD_TEMPERATURE)


def eager_surrogate(student: nn.Module, teacher: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Mixup with a share for each image, then the softened outputs of both."""
    share = torch.rand(len(images), 1, 1, 1, device=images.device)
    partner = torch.randperm(len(images), device=images.device)
    mixed = share * images + (1 - share) * images[partner]
    with torch.no_grad():
        target = teacher(mixed)
    return _kl(student(mixed), target, SURROGATE_TEMPERATURE)


def _ours_dmkd(teacher: nn.Module, student: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    from kdfast.methods import DMKD
    from kdfast.methods.dmkd import DMKDConfig

    config = DMKDConfig(temperature=DMKD_TEMPERATURE, cutmix_alpha=CUTMIX_ALPHA)
    return DMKD(student, teacher, config=config).step


def _ours_surrogate(teacher: nn.Module, student: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    from kdfast.methods.surrogate import SurrogateKD, SurrogateKDConfig

    config = SurrogateKDConfig(temperature=SURROGATE_TEMPERATURE, regime="none", mixup=True)
    return SurrogateKD(student, teacher, config=config).step


class _Seen(nn.Module):
    """A teacher that remembers which images it was asked about, for the check."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images = network, torch.empty(0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        logits: torch.Tensor = self.network(images)
        return logits


class _Networks:
    """A teacher and a student with random weights, and rotating images; every provider trains copies."""

    turns = 4

    def __init__(self, size: _Size, settings: Settings) -> None:
        self.size, self.settings = size, settings

    @functools.cached_property
    def pair(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        options: dict[str, Any] = {"stem": "imagenet"} if self.size.side > 64 else {}
        made: list[Any] = [
            create_model(name, self.size.classes, **options).to(self.settings.device)
            for name in (self.size.teacher, self.size.student)
        ]
        for network in made:
            network.to(memory_format=torch.channels_last)
        return made[0].eval().requires_grad_(False), made[1].train()

    @functools.cached_property
    def images(self) -> list[torch.Tensor]:
        generator = torch.Generator(self.settings.device).manual_seed(0)
        shape = (self.size.batch, 3, self.size.side, self.size.side)
        drawn = (
            torch.rand(shape, generator=generator, device=self.settings.device) for _ in range(self.turns)
        )
        return [images.contiguous(memory_format=torch.channels_last) for images in drawn]

    def training(
        self, make: Callable[[nn.Module, nn.Module], Callable[[torch.Tensor], torch.Tensor]]
    ) -> Work:
        """A step with its optimiser; returns the loss before it, and the images that it was of."""
        teacher, student = _Seen(self.pair[0]).eval(), copy.deepcopy(self.pair[1])
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
        loss_of, device = make(teacher, student), self.settings.device

        def step(turn: int) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = loss_of(self.images[turn % self.turns])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach(), teacher.images

        return step

    def check(self, result: tuple[torch.Tensor, torch.Tensor], temperature: float) -> None:
        """The first step's loss, of the very images that both networks saw, in float64."""
        loss, images = result
        teacher, student = (copy.deepcopy(network).double() for network in self.pair)
        with torch.no_grad():
            want = float(_kl(student(images.double()), teacher(images.double()), temperature))
        limit = 1e-3 if self.settings.device == "cpu" else 5e-2  # bfloat16 networks
        assert abs(float(loss) / want - 1) < limit, f"the loss is {float(loss):.6g}; {want:.6g} is right"


def _case(
    name: str,
    networks: _Networks,
    eager: Step,
    ours: Callable[[nn.Module, nn.Module], Callable[[torch.Tensor], torch.Tensor]],
    temperature: float,
) -> Case:
    on_gpu = networks.settings.device == "cuda"

    def eagerly(teacher: nn.Module, student: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: eager(student, teacher, images)

    def with_compiled(make: Any) -> Callable[[nn.Module, nn.Module], Any]:
        if not on_gpu:
            raise Absent("compiling two networks takes minutes on a CPU; it is measured on a GPU")
        # Both networks, as one would: the step round them draws random numbers and stays as it is.
        torch._dynamo.reset()
        return lambda teacher, student: make(torch.compile(teacher), torch.compile(student))

    def build(make: Any, compile_networks: bool = False) -> Callable[[], Work]:
        return lambda: networks.training(with_compiled(make) if compile_networks else make)

    compiled = "kdfast, networks compiled"
    config = "bf16, channels last" if on_gpu else "float32, channels last"
    providers = (
        Provider("eager", build(eagerly), graph=False, config=config),
        Provider(
            "eager, networks compiled", build(eagerly, True), graph=False, config=config, against=compiled
        ),
        Provider("kdfast", build(ours), graph=False, config=config),
        Provider(compiled, build(ours, True), graph=False, config=config),
    )
    size = networks.size
    params = {
        "teacher": size.teacher,
        "student": size.student,
        "batch": size.batch,
        "side": size.side,
        "classes": size.classes,
    }
    return Case(
        "distill",
        name,
        params,
        networks.turns,
        providers,
        lambda provider, result: networks.check(result, temperature),
        size.batch,
        "images",
    )
