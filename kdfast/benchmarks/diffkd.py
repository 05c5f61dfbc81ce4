"""DiffKD beside the same method in eager PyTorch with diffusers' scheduler, and beside torch.compile of that.

Rows: the method's own networks forward and backward (features and logits), logits alone, and a whole training step.
The convolutions are the same for everyone. What differs is what surrounds them; for one DDIM step, in moves of the
latent (X bytes, B=256, 1024×7×7):

    eager, diffusers    21X forward   22X backward    batch norm 4, x₀ and direction 17
    kdfast               3X forward    3X backward    reads ε̂'s batch-norm input and z, writes z'

The bytes that each keeps for backward stand in its configuration: they are counted, not sampled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.benchmarks import _diffkd_eager as eager
from kdfast.benchmarks.case import Absent, Case, Provider, Settings, Work, compiled
from kdfast.methods.diffkd import Denoising, DiffKDConfig
from kdfast.methods.diffkd.memory import saved_bytes
from kdfast.models import create_model
from kdfast.models.layers import ConvNet

#: A pair's terms (diffusion, autoencoder, distance, stacked) of its two features.
Terms = Callable[[Denoising, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Of one row of cases: batch, channels of student, teacher and latent, side of the map, classes."""

    batch: int
    student: int
    teacher: int
    latent: int
    side: int
    classes: int
    image: int


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    tiny = Size(8, 4, 6, 8, 3, 10, 8)
    small = Size(32, 64, 64, 64, 7, 100, 16)
    if settings.device == "cuda":
        size = settings.pick(tiny, *(Size(256, 1024, 2048, 1024, 7, 1000, 224),) * 2)
    else:
        size = settings.pick(tiny, small, Size(64, 128, 256, 128, 7, 100, 32))
    inputs = _Inputs(size, settings.device)
    # A minute of compiling on a CPU is no quick look.
    compiler = settings.device == "cuda" or not settings.quick
    yield _case("features and logits", ("feature", "logits"), inputs, compiler=compiler)
    yield _case("logits alone", ("logits",), inputs, compiler=compiler)
    yield _step_case(inputs)


class _Inputs:
    """Features of both networks, and the method's modules, the same for every provider."""

    def __init__(self, size: Size, device: str) -> None:
        self.size, self.device = size, device

    def modules(self) -> dict[str, Denoising]:
        """Fresh ones of the same weights."""
        torch.manual_seed(0)
        size, config = self.size, DiffKDConfig(latent_channels=self.size.latent)
        made = {
            "feature": Denoising(
                size.student, size.teacher, dense=True, latent=size.latent, distance="mse", config=config
            ),
            "logits": Denoising(
                size.classes, size.classes, dense=False, latent=None, distance="kl", config=config
            ),
        }
        return {name: module.to(self.device).train() for name, module in made.items()}

    def features(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of student (which wants a gradient) and teacher."""
        generator = torch.Generator(self.device).manual_seed(1)
        size = self.size
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32

        def draw(channels: int, side: int) -> Tensor:
            shape = (size.batch, channels, side, side)
            return torch.randn(shape, generator=generator, device=self.device).to(dtype)

        return {
            "feature": (draw(size.student, size.side).requires_grad_(), draw(size.teacher, size.side)),
            "logits": (draw(size.classes, 1).requires_grad_(), draw(size.classes, 1)),
        }

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 on a GPU, as one trains there."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def params(self) -> dict[str, object]:
        size = self.size
        return {
            "batch": size.batch,
            "latent": f"{size.latent}x{size.side}x{size.side}",
            "classes": size.classes,
            "dtype": "bf16" if self.device == "cuda" else "fp32",
        }


def _ours(module: Denoising, student: Tensor, teacher: Tensor) -> Tensor:
    found = module(student, teacher)
    return torch.stack([found.diffusion, found.autoencoder, found.kd])


def _theirs(device: str) -> Terms:
    ddim = eager.scheduler(device)
    return lambda module, student, teacher: eager.terms(module, ddim, student, teacher)


def _build(names: tuple[str, ...], inputs: _Inputs, terms: Callable[[], Terms]) -> Callable[[], Work]:
    def build() -> Work:
        call, modules, features = terms(), inputs.modules(), inputs.features()
        leaves = [features[name][0] for name in names]
        leaves += [p for name in names for p in modules[name].parameters()]

        def work(turn: int) -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            with inputs.autocast():
                found = torch.stack([call(modules[name], *features[name]) for name in names])
            found.sum().backward()  # type: ignore[no-untyped-call]
            return found.detach()

        return work

    return build


def _kept(names: tuple[str, ...], inputs: _Inputs, terms: Callable[[], Terms]) -> str:
    """What a provider keeps for backward, in words."""
    try:
        call = terms()
    except Absent:
        return ""
    modules, features, total = inputs.modules(), inputs.features(), 0
    for name in names:
        with inputs.autocast(), saved_bytes(modules[name]) as counted:
            call(modules[name], *features[name])
        total += counted.total
    return f"keeps {total / 2**20:.1f} MiB for backward"


def _case(name: str, names: tuple[str, ...], inputs: _Inputs, *, compiler: bool) -> Case:
    def theirs() -> Terms:
        return _theirs(inputs.device)

    def ours() -> Terms:
        return _ours

    def through_compiler() -> Terms:
        return compiled(_theirs(inputs.device))

    reference: list[Tensor] = []

    def check(provider: str, found: Tensor) -> None:
        if not reference:
            reference.append(_build(names, inputs, ours)()(0).float().cpu())
        off = (found.float().cpu() - reference[0]).abs() / reference[0].abs().clamp_min(1e-6)
        # Random numbers are each provider's own. The autoencoder has none; the distances hardly vary.
        exact = 2e-2 if inputs.device == "cuda" else 1e-3
        assert float(off[:, 1].max()) < exact, f"reconstruction is off by {float(off[:, 1].max()):.1e}"
        assert float(off.max()) < 0.5, f"a term is off by {float(off.max()):.1e}"

    providers = (
        Provider("eager", _build(names, inputs, theirs), graph=False, config=_kept(names, inputs, theirs)),
        *(
            (Provider("torch.compile", _build(names, inputs, through_compiler), graph=False),)
            if compiler
            else ()
        ),
        Provider("kdfast", _build(names, inputs, ours), config=_kept(names, inputs, ours)),
    )
    return Case("diffkd", name, inputs.params(), 1, providers, check, inputs.size.batch, "samples")


def _step_case(inputs: _Inputs) -> Case:
    """Teacher, student, losses, backward and SGD; and plain KD, over which the rest is what the method costs."""
    size = inputs.size
    names = (
        ("resnet34", "resnet18") if inputs.device == "cuda" and size.image > 32 else ("resnet14", "resnet8")
    )
    stem: dict[str, Any] = {"stem": "imagenet"} if size.image > 32 else {}

    def prepare() -> tuple[ConvNet, ConvNet, Tensor, Tensor]:
        torch.manual_seed(0)
        made = (create_model(name, size.classes, **stem).to(inputs.device) for name in names)
        teacher, student = (cast(ConvNet, network) for network in made)
        images = torch.randn(size.batch, 3, size.image, size.image, device=inputs.device)
        if inputs.device == "cuda":
            for network in (teacher, student):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = images.to(memory_format=torch.channels_last)
        labels = torch.randint(size.classes, (size.batch,), device=inputs.device)
        return teacher.eval().requires_grad_(False), student.train(), images, labels

    def builder(kind: str) -> Callable[[], Work]:
        def build() -> Work:
            teacher, student, images, labels = prepare()
            ddim = eager.scheduler(inputs.device) if kind == "eager" else None
            widths = teacher.num_features, student.num_features
            config = DiffKDConfig(latent_channels=size.latent)
            torch.manual_seed(0)
            modules = nn.ModuleDict(
                {
                    "feature": Denoising(
                        widths[1], widths[0], dense=True, latent=size.latent, distance="mse", config=config
                    ),
                    "logits": Denoising(
                        size.classes, size.classes, dense=False, latent=None, distance="kl", config=config
                    ),
                }
            ).to(inputs.device)
            own = [] if kind == "plain KD" else list(modules.parameters())
            optimizer = torch.optim.SGD([*student.parameters(), *own], 1e-4, momentum=0.9)
            state = copy.deepcopy(student.state_dict())

            def work(turn: int) -> Tensor:
                if turn == 0:
                    student.load_state_dict(state)
                optimizer.zero_grad()
                with inputs.autocast():
                    with torch.no_grad():
                        seen = teacher.forward_features(images)
                        guide = teacher.forward_head(seen)
                    feature = student.forward_features(images)
                    logits = student.forward_head(feature)
                    task = F.cross_entropy(logits.float(), labels)
                    if kind == "plain KD":
                        log_q, p = logits.float().log_softmax(1), guide.float().softmax(1)
                        loss = task + F.kl_div(log_q, p, reduction="batchmean")
                    else:
                        pairs = {"feature": (feature, seen), "logits": (_map(logits), _map(guide))}
                        loss = task
                        for name, (a, b) in pairs.items():
                            module = cast(Denoising, modules[name])
                            part = _ours(module, a, b) if ddim is None else eager.terms(module, ddim, a, b)
                            loss = loss + part.sum()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                return task.detach()

            return work

        return build

    def check(provider: str, found: Tensor) -> None:
        expected = builder("plain KD")()(0)
        error = float((found - expected).abs() / expected)
        assert error < 5e-2, f"the task loss is off by {error:.1e}"

    params = {**inputs.params(), "networks": "→".join(names), "image": size.image}
    providers = tuple(
        Provider(kind, builder(kind), graph=False, against="" if kind == "plain KD" else "kdfast")
        for kind in ("plain KD", "eager", "kdfast")
    )
    return Case("diffkd", "training step", params, 1, providers, check, size.batch, "images")


def _map(logits: Tensor) -> Tensor:
    return logits[:, :, None, None]
