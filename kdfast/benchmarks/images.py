"""What inversion does to a batch beside the networks: random crops with their gradient, batch-norm statistics.

Traffic of kdfast, counted in N (elements of one operand) of S bytes each:

    crop, flip, normalise, uint8 in          5N of bytes: 1 read, 4 written
    the same on float32, with gradient       16N of bytes: 2S forward, 2S backward
    batch-norm statistics and gradient       3S: read; read and write; 4S with the batch norm's own gradient
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.backend import triton_available
from kdfast.benchmarks.case import Case, Provider, Settings, Traffic, Work, compiled
from kdfast.benchmarks.environment import turns_for
from kdfast.functional import bn_statistics_loss, crop_flip_normalize

MEAN, STD, PADDING = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 4
BOTH = ("forward", "forward and backward")


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    shape = settings.pick((4, 3, 8, 8), (256, 3, 32, 32), (256, 3, 32, 32))
    yield _crop_case(_Crops(shape, settings.device, torch.uint8), settings)
    yield _crop_case(_Crops(shape, settings.device, torch.float32), settings)
    features = settings.pick([(4, 8, 4, 4)], [(64, 64, 16, 16)], [(256, 64, 32, 32), (256, 512, 4, 4)])
    if settings.device == "cuda" and not settings.tiny:
        features = [(256, 64, 32, 32), (256, 512, 4, 4), (256, 2048, 7, 7)]
    for feature in features:
        yield _statistics_case(_Features(feature, settings.device), settings)


def eager_crop(images: Tensor, offsets: Tensor, flips: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """One gather of the padded batch, then the normalisation: no loop over images."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    batch, _, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    picked = padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return (picked - mean) / std


def eager_crop_each(images: Tensor, offsets: Tensor, flips: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Image by image, as transforms for one image do it; offsets cross to the host first."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    height, width = images.shape[2:]
    out = []
    for image, (top, left), flip in zip(images, offsets.tolist(), flips.tolist(), strict=True):
        piece = F.pad(image, (PADDING,) * 4)[:, top : top + height, left : left + width]
        out.append(piece.flip(-1) if flip else piece)
    return (torch.stack(out) - mean) / std


def eager_statistics(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """DeepInversion's hook."""
    mean = x.mean([0, 2, 3])
    var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
    loss: Tensor = torch.norm(running_var - var, 2) + torch.norm(running_mean - mean, 2)
    return loss


class _Crops:
    """Rotating batches with their crops."""

    def __init__(self, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.elements = int(torch.Size(shape).numel())
        self.trains = dtype.is_floating_point
        self.turns = turns_for(2 * self.elements * dtype.itemsize, device)

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator(self.device).manual_seed(0)
        found = []
        for _ in range(self.turns):
            images = torch.rand(self.shape, generator=generator, device=self.device)
            if not self.trains:
                images = (images * 255).to(torch.uint8)
            offsets = torch.randint(
                0, 2 * PADDING + 1, (self.shape[0], 2), generator=generator, device=self.device
            )
            flips = torch.rand(self.shape[0], generator=generator, device=self.device) < 0.5
            found.append((images.requires_grad_(self.trains), offsets, flips))
        return found

    def check(self, provider: str, result: tuple[Tensor, Tensor | None]) -> None:
        images, offsets, flips = self.batches[0]
        wide = (images.double() / (1 if self.trains else 255)).detach().requires_grad_(self.trains)
        mean, std = (
            torch.tensor(v, dtype=torch.float64, device=self.device).view(-1, 1, 1) for v in (MEAN, STD)
        )
        want = eager_crop_each(wide, offsets, flips, mean, std)
        torch.testing.assert_close(result[0].double(), want, rtol=1e-5, atol=1e-5)
        if self.trains:
            assert result[1] is not None
            (grad,) = torch.autograd.grad(want.sum(), wide)
            torch.testing.assert_close(result[1].double(), grad, rtol=1e-5, atol=1e-5)


def _crop_case(inputs: _Crops, settings: Settings) -> Case:
    def built(crop: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
        def work(turn: int) -> tuple[Tensor, Tensor | None]:
            images, offsets, flips = inputs.batches[turn % inputs.turns]
            out = crop(images, offsets, flips)
            return out, torch.autograd.grad(out.sum(), images)[0] if inputs.trains else None

        return work

    def plain(function: Any) -> Callable[[], Work]:
        def build() -> Work:
            mean, std = (torch.tensor(v, device=inputs.device).view(-1, 1, 1) for v in (MEAN, STD))
            return built(lambda *batch: function(*batch, mean, std))

        return build

    def ours(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        return crop_flip_normalize(images, offsets, flips, MEAN, STD, padding=PADDING)

    fused = settings.device == "cuda" and triton_available()
    count = 16 if inputs.trains else 5
    traffic = Traffic(f"{count}N", count * inputs.elements) if fused else None
    providers: tuple[Provider, ...] = (
        Provider("eager, image by image", plain(eager_crop_each), graph=False),
        Provider("eager, one gather", plain(eager_crop), graph=not inputs.trains),
        Provider("torch.compile", lambda: plain(compiled(eager_crop))(), graph=not inputs.trains),
        Provider("kdfast", lambda: built(ours), traffic, graph=not inputs.trains),
    )
    if settings.device == "cuda" and settings.quick and not settings.tiny:
        providers = providers[1:]  # a thousand launches a call: seconds of a GPU, to say what everybody knows
    params = {"shape": "x".join(map(str, inputs.shape)), "dtype": str(inputs.dtype).removeprefix("torch.")}
    name = f"crop, flip, normalise, {BOTH[inputs.trains]}"
    return Case(
        "images",
        name,
        params,
        inputs.turns,
        providers,
        inputs.check,
        inputs.shape[0],
        "images",
        family="images",
    )


class _Features:
    """Rotating inputs of a batch norm."""

    def __init__(self, shape: tuple[int, ...], device: str) -> None:
        self.shape, self.device = shape, device
        self.size = int(torch.Size(shape).numel()) * 4
        self.turns = turns_for(2 * self.size, device)

    @cached_property
    def batches(self) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        return [
            torch.randn(self.shape, generator=generator, device=self.device).requires_grad_()
            for _ in range(self.turns)
        ]

    @cached_property
    def running(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(1)
        mean, var = torch.rand(2, self.shape[1], generator=generator, device=self.device)
        return mean, var + 0.5

    def check(self, provider: str, result: tuple[Tensor, Tensor]) -> None:
        x = self.batches[0].detach().double().requires_grad_()
        want = eager_statistics(x, *(t.double() for t in self.running))
        torch.testing.assert_close(result[0].double(), want, rtol=1e-4, atol=1e-5)
        (grad,) = torch.autograd.grad(want, x)
        error = (result[1].double() - grad).abs().max() / grad.abs().max()
        assert float(error) < 1e-4, f"gradient off by {float(error):.1e} of its largest value"


def _statistics_case(inputs: _Features, settings: Settings) -> Case:
    def built(function: Callable[..., Tensor]) -> Work:
        running = inputs.running

        def work(turn: int) -> tuple[Tensor, Tensor]:
            x = inputs.batches[turn % inputs.turns]
            loss = function(x, *running)
            return loss, torch.autograd.grad(loss, x)[0]

        return work

    fused = settings.device == "cuda" and triton_available()
    providers = (
        Provider("eager", lambda: built(eager_statistics), graph=False),
        Provider("torch.compile", lambda: built(compiled(eager_statistics)), graph=False),
        Provider(
            "kdfast",
            lambda: built(lambda *args: bn_statistics_loss(*args).loss),
            Traffic("3S", 3 * inputs.size) if fused else None,
            graph=False,
        ),
    )
    params = {"shape": "x".join(map(str, inputs.shape)), "dtype": "float32"}
    name = f"batch-norm statistics, {BOTH[1]}"
    return Case(
        "images", name, params, inputs.turns, providers, inputs.check, 1, "call", 2 * inputs.size, "norm"
    )
